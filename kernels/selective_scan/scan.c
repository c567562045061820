/* Selective scan for the CPU: forward and adjoint, float32. compiled.py prepares the arguments; README.md derives it.
 *
 * Letters: b batch row, k direction, t token row, g channel group, e channel within its group, n state.
 * Work is cut into strips of neighbouring channels. A strip walks along the order with its states in the nearest
 * cache, all K directions one after the other, so directions that share a row add to it in a fixed sequence. */

#include "vectors.c"

typedef struct {
  const float *data;                    /* NULL where absent */
  int64_t batch, direction, row, group; /* strides in floats; the last dimension is dense */
  int64_t directions;                   /* 1 where all share it, else K */
} Input;

typedef struct {
  int32_t low, high;     /* steps of a chunk */
  int32_t sequence;      /* of a packed batch, or -1: the batch row */
  int32_t flags;         /* 1: first chunk of its sequence, 2: last one */
} Chunk;

typedef struct {
  int64_t batch, directions, length, groups, width, states; /* width: channels per group */
  int64_t chunks, max_chunk;                                 /* chunks of a direction, steps of the longest */
  int64_t parts, threads, softplus, reduce;                  /* parts: pieces of a group in the backward */
  Input u, delta, B, C, z, grad_out;
  const float *A;                    /* (1 or K, G, N, Ec), times log2 e */
  const float *D, *bias;             /* (1 or K, E) */
  int64_t A_step, D_step, bias_step; /* floats from one direction to the next, 0 where shared */
  const Chunk *plan;                 /* (1 or K, chunks) */
  int64_t plan_step;
  const int32_t *orders, *lengths;            /* (K, L), (Bt,) or NULL */
  const float *initial, *grad_last;           /* (S, K, E, N) or NULL */
  float *out, *last, *saved;                  /* (Bt, 1 or K, L, E), (S, K, E, N), (chunks, Bt, K, G, N, Ec) */
  float *du, *ddelta, *dz;                    /* (Bt, 1 or K, L, E) */
  float *dB, *dC;                             /* (parts, Bt, 1 or K, L, G, N), zeroed */
  float *dA, *dD, *dbias;                     /* (Bt, K, G, N, Ec), (Bt, K, E) twice, zeroed */
  float *dinitial;                            /* (S, K, E, N) or NULL */
} Scan;

#define EACH(v) for (int v = 0; v < STRIP_VECTORS; v++)

/* A strip: ``width`` channels from ``e`` on in group ``g`` of batch row ``b``, in direction ``k``. */
typedef struct {
  int64_t b, k, g, e, width;
} Strip;

INLINE int64_t channel(const Scan *s, const Strip *at) { return at->g * s->width + at->e; }

INLINE const float *row_of(const Input *x, const Strip *at, int64_t row) {
  return x->data + at->b * x->batch + at->k * x->direction + row * x->row;
}

INLINE int64_t visited(const Scan *s, const Strip *at, int64_t step) {
  return s->orders ? s->orders[at->k * s->length + step] : step;
}

INLINE int valid(const Scan *s, const Strip *at, int64_t row) { return !s->lengths || row < s->lengths[at->b]; }

/* Offset of row ``row`` in a result (Bt, directions, L, E). */
INLINE int64_t result(const Scan *s, const Strip *at, int64_t directions, int64_t row) {
  int64_t k = directions == 1 ? 0 : at->k;
  return ((at->b * directions + k) * s->length + row) * s->groups * s->width + channel(s, at);
}

INLINE float *kept(const Scan *s, const Strip *at, int64_t slot) {
  int64_t place = ((slot * s->batch + at->b) * s->directions + at->k) * s->groups + at->g;
  return s->saved + place * s->states * s->width + at->e;
}

/* States (S, K, E, N) hold the state dimension last; inside, channels are. */
INLINE int64_t state_of(const Scan *s, const Strip *at, const Chunk *chunk) {
  int64_t sequence = chunk->sequence < 0 ? at->b : chunk->sequence;
  return ((sequence * s->directions + at->k) * s->groups * s->width + channel(s, at)) * s->states;
}

static void read_state(const Scan *s, const Strip *at, const Chunk *chunk, const float *from, V *h) {
  memset(h, 0, s->states * STRIP * sizeof(float));
  if (from == NULL) return;
  from += state_of(s, at, chunk);
  for (int64_t e = 0; e < at->width; e++)
    for (int64_t n = 0; n < s->states; n++) ((float *)h)[n * STRIP + e] = from[e * s->states + n];
}

static void write_state(const Scan *s, const Strip *at, const Chunk *chunk, float *to, const V *h) {
  to += state_of(s, at, chunk);
  for (int64_t e = 0; e < at->width; e++)
    for (int64_t n = 0; n < s->states; n++) to[e * s->states + n] = ((const float *)h)[n * STRIP + e];
}

static void read_parameters(const Scan *s, const Strip *at, V *A, V *D, V *bias) {
  const float *from = s->A + at->k * s->A_step + at->g * s->states * s->width + at->e;
  for (int64_t n = 0; n < s->states; n++) load(A + n * STRIP_VECTORS, from + n * s->width, at->width);
  if (s->D) load(D, s->D + at->k * s->D_step + channel(s, at), at->width);
  else memset(D, 0, STRIP * sizeof(float));
  if (s->bias) load(bias, s->bias + at->k * s->bias_step + channel(s, at), at->width);
  else memset(bias, 0, STRIP * sizeof(float));
}

#define AHEAD 6 /* steps between asking for a row and needing it */

INLINE void fetch_row(const Scan *s, const Strip *at, const Input *x, int64_t row) {
  if (x->data) fetch(row_of(x, at, row) + channel(s, at));
}

/* delta after bias and softplus, and the slope of the latter. */
INLINE void read_delta(const Scan *s, const Strip *at, int64_t row, const V *bias, V *delta, V *slope) {
  load(delta, row_of(&s->delta, at, row) + channel(s, at), at->width);
  EACH(v) {
    V raw = delta[v] + bias[v];
    if (slope) slope[v] = s->softplus ? sigmoid_(raw) : splat(1.0f);
    delta[v] = s->softplus ? softplus_(raw) : raw;
  }
}

static void forward_strip(const void *argument, int64_t item, void *memory) {
  const Scan *s = argument;
  const int64_t strips = (s->width + STRIP - 1) / STRIP, N = s->states;
  V *h = memory, *A = h + N * STRIP_VECTORS;
  Strip at = {.b = item / (s->groups * strips), .g = item / strips % s->groups, .e = item % strips * STRIP};
  at.width = s->width - at.e < STRIP ? s->width - at.e : STRIP;
  for (at.k = 0; at.k < s->directions; at.k++) {
    V D[STRIP_VECTORS], bias[STRIP_VECTORS];
    const int add = s->reduce && at.k;
    read_parameters(s, &at, A, D, bias);
    for (int64_t c = 0; c < s->chunks; c++) {
      const Chunk *chunk = s->plan + at.k * s->plan_step + c;
      if (chunk->low >= chunk->high) break;
      if (chunk->flags & 1) read_state(s, &at, chunk, s->initial, h);
      for (int64_t n = 0; n < N; n++) store(kept(s, &at, c) + n * s->width, h + n * STRIP_VECTORS, at.width);
      for (int64_t step = chunk->low; step < chunk->high; step++) {
        const int64_t row = visited(s, &at, step);
        if (step + AHEAD < s->length) {
          const int64_t later = visited(s, &at, step + AHEAD);
          fetch_row(s, &at, &s->delta, later);
          fetch_row(s, &at, &s->u, later);
          fetch_row(s, &at, &s->z, later);
        }
        V u[STRIP_VECTORS], delta[STRIP_VECTORS], y[STRIP_VECTORS];
        if (valid(s, &at, row)) {
          read_delta(s, &at, row, bias, delta, NULL);
          load(u, row_of(&s->u, &at, row) + channel(s, &at), at.width);
          const float *B = row_of(&s->B, &at, row) + at.g * s->B.group, *C = row_of(&s->C, &at, row) + at.g * s->C.group;
          EACH(v) {
            y[v] = D[v] * u[v];
            u[v] *= delta[v];
          }
          for (int64_t n = 0; n < N; n++) {
            V *h_n = h + n * STRIP_VECTORS, *A_n = A + n * STRIP_VECTORS;
            EACH(v) {
              h_n[v] = exp2_(delta[v] * A_n[v]) * h_n[v] + u[v] * B[n];
              y[v] += h_n[v] * C[n];
            }
          }
          if (s->z.data) {
            V z[STRIP_VECTORS];
            load(z, row_of(&s->z, &at, row) + channel(s, &at), at.width);
            EACH(v) y[v] *= z[v] * sigmoid_(z[v]);
          }
        } else {
          memset(y, 0, sizeof y);
        }
        put(s->out + result(s, &at, s->reduce ? 1 : s->directions, row), y, at.width, add);
      }
      if (chunk->flags & 2) write_state(s, &at, chunk, s->last, h);
    }
  }
}

/* What the adjoint keeps of one step while it works on a chunk. */
typedef struct {
  V delta[STRIP_VECTORS], u[STRIP_VECTORS], slope[STRIP_VECTORS];
  int64_t row;
  int64_t valid;
} Step;

typedef struct {
  V *A, *dA;      /* (N) strips */
  V *states;      /* (T + 1, N) strips: before the chunk and after each step */
  V *decay;       /* (T, N) strips */
  V *sum_B, *sum_C; /* (T, N) vectors: gradients of B and C over the strips done so far, lanes not yet added up */
  V *carry;       /* (strips of the part, N) strips: gradient of the state after the chunk */
  Step *steps;    /* (T) */
} Room;

/* Cut the workspace into its parts; returns how much of it they need. */
static size_t lay_out(const Scan *s, int64_t part_strips, char *memory, Room *room) {
  const size_t N = s->states, T = s->max_chunk, strip = STRIP * sizeof(float);
  const size_t sizes[] = {N * strip,       N * strip,       (T + 1) * N * strip,     T * N * strip,
                          T * N * sizeof(V), T * N * sizeof(V), part_strips * N * strip, T * sizeof(Step)};
  size_t used = 0;
  char *at[8];
  for (int i = 0; i < 8; used += sizes[i++]) at[i] = memory ? memory + used : NULL;
  *room = (Room){(V *)at[0], (V *)at[1], (V *)at[2], (V *)at[3], (V *)at[4], (V *)at[5], (V *)at[6], (Step *)at[7]};
  return used;
}

static void recompute(const Scan *s, const Strip *at, const Chunk *chunk, int64_t c, const V *bias, Room *room) {
  const int64_t N = s->states;
  V *h = room->states;
  for (int64_t n = 0; n < N; n++) load(h + n * STRIP_VECTORS, kept(s, at, c) + n * s->width, at->width);
  for (int64_t i = 0; i < chunk->high - chunk->low; i++) {
    Step *step = room->steps + i;
    V *next = h + N * STRIP_VECTORS, *decay = room->decay + i * N * STRIP_VECTORS;
    step->row = visited(s, at, chunk->low + i);
    if (chunk->low + i + AHEAD < chunk->high) {
      const int64_t later = visited(s, at, chunk->low + i + AHEAD);
      fetch_row(s, at, &s->delta, later);
      fetch_row(s, at, &s->u, later);
    }
    fetch_row(s, at, &s->grad_out, step->row); /* for the adjoint */
    fetch_row(s, at, &s->z, step->row);
    step->valid = valid(s, at, step->row);
    if (step->valid) {
      V x[STRIP_VECTORS];
      const float *B = row_of(&s->B, at, step->row) + at->g * s->B.group;
      read_delta(s, at, step->row, bias, step->delta, step->slope);
      load(step->u, row_of(&s->u, at, step->row) + channel(s, at), at->width);
      EACH(v) x[v] = step->delta[v] * step->u[v];
      for (int64_t n = 0; n < N; n++) EACH(v) {
          const int64_t j = n * STRIP_VECTORS + v;
          decay[j] = exp2_(step->delta[v] * room->A[j]);
          next[j] = decay[j] * h[j] + x[v] * B[n];
        }
    } else {
      memcpy(next, h, N * STRIP * sizeof(float));
    }
    h = next;
  }
}

/* Turn the gradient of a gated result into that of the result, and write the gradient of the gate. */
static void through_gate(const Scan *s, const Strip *at, const Step *step, const V *h, const V *D, const float *C, V *grad) {
  V z[STRIP_VECTORS], y[STRIP_VECTORS];
  load(z, row_of(&s->z, at, step->row) + channel(s, at), at->width);
  EACH(v) y[v] = D[v] * step->u[v];
  for (int64_t n = 0; n < s->states; n++) EACH(v) y[v] += h[n * STRIP_VECTORS + v] * C[n];
  EACH(v) {
    V sigmoid = sigmoid_(z[v]);
    y[v] *= grad[v] * sigmoid * (1.0f + z[v] * (1.0f - sigmoid));
    grad[v] *= z[v] * sigmoid;
  }
  const int64_t directions = s->z.directions;
  put(s->dz + result(s, at, directions, step->row), y, at->width, directions == 1 && at->k);
}

static void clear_row(const Scan *s, const Strip *at, int64_t row) {
  const V zero[STRIP_VECTORS] = {{0}};
  struct { const Input *input; float *grad; } all[] = {{&s->u, s->du}, {&s->delta, s->ddelta}, {&s->z, s->dz}};
  for (int i = 0; i < 3; i++) {
    const int64_t directions = all[i].input->directions;
    if (all[i].grad && (directions > 1 || at->k == 0)) store(all[i].grad + result(s, at, directions, row), zero, at->width);
  }
}

/* The adjoint of one chunk of one strip, last step first. ``q`` is the gradient of the state after the chunk. */
static void adjoint_chunk(const Scan *s, const Strip *at, const Chunk *chunk, const V *D, V *restrict q, V *dD, V *dbias,
                          Room *room) {
  const int64_t N = s->states, wide = N * STRIP_VECTORS;
  for (int64_t i = chunk->high - chunk->low - 1; i >= 0; i--) {
    const Step *step = room->steps + i;
    if (!step->valid) {
      clear_row(s, at, step->row);
      continue;
    }
    const V *before = room->states + i * wide, *after = before + wide, *decay = room->decay + i * wide;
    const float *B = row_of(&s->B, at, step->row) + at->g * s->B.group, *C = row_of(&s->C, at, step->row) + at->g * s->C.group;
    V grad[STRIP_VECTORS], x[STRIP_VECTORS], sum[STRIP_VECTORS] = {{0}}, slope[STRIP_VECTORS] = {{0}};
    load(grad, row_of(&s->grad_out, at, step->row) + channel(s, at), at->width);
    if (s->z.data) through_gate(s, at, step, after, D, C, grad);
    EACH(v) x[v] = step->delta[v] * step->u[v];
    V *restrict sum_B = room->sum_B + i * N, *restrict sum_C = room->sum_C + i * N, *restrict dA = room->dA;
    for (int64_t n = 0; n < N; n++) {
      V for_B = sum_B[n], for_C = sum_C[n];
      EACH(v) {
        const int64_t j = n * STRIP_VECTORS + v;
        const V g = q[j] + grad[v] * C[n]; /* gradient of the state after this step */
        for_C += grad[v] * after[j];
        for_B += g * x[v];
        sum[v] += g * B[n];
        q[j] = decay[j] * g;
        const V e = q[j] * before[j]; /* gradient of delta A */
        slope[v] += e * room->A[j];
        dA[j] += e * step->delta[v];
      }
      sum_B[n] = for_B;
      sum_C[n] = for_C;
    }
    V du[STRIP_VECTORS], ddelta[STRIP_VECTORS];
    EACH(v) {
      du[v] = sum[v] * step->delta[v] + D[v] * grad[v];
      ddelta[v] = (slope[v] * LN2 + sum[v] * step->u[v]) * step->slope[v];
      dD[v] += grad[v] * step->u[v];
      dbias[v] += ddelta[v];
    }
    const int64_t for_u = s->u.directions, for_delta = s->delta.directions;
    put(s->du + result(s, at, for_u, step->row), du, at->width, for_u == 1 && at->k);
    put(s->ddelta + result(s, at, for_delta, step->row), ddelta, at->width, for_delta == 1 && at->k);
  }
}

/* Add the sums over channels to the gradient of B or C of this part. */
static void add_sums(const Scan *s, const Strip *at, const Chunk *chunk, const Room *room, const V *sums, const Input *input,
                     float *grad, int64_t part) {
  const int64_t directions = input->directions, k = directions == 1 ? 0 : at->k;
  float *base = grad + ((part * s->batch + at->b) * directions + k) * s->length * s->groups * s->states;
  for (int64_t i = 0; i < chunk->high - chunk->low; i++) {
    if (!room->steps[i].valid) continue;
    float *to = base + (room->steps[i].row * s->groups + at->g) * s->states;
    for (int64_t n = 0; n < s->states; n++) to[n] += lanes_sum(sums[i * s->states + n]);
  }
}

/* One part of the strips of a group of a batch row. Chunks go outside and strips inside, so that the gradients of B and C
 * of a chunk add up over the strips as vectors before their lanes are summed. */
static void backward_part(const void *argument, int64_t item, void *memory) {
  const Scan *s = argument;
  const int64_t strips = (s->width + STRIP - 1) / STRIP, N = s->states, channels = s->groups * s->width;
  const int64_t part = item % s->parts, from = part * strips / s->parts, to = (part + 1) * strips / s->parts;
  Strip at = {.b = item / (s->groups * s->parts), .g = item / s->parts % s->groups};
  Room room;
  lay_out(s, to - from, memory, &room);
  for (at.k = 0; at.k < s->directions; at.k++) {
    int64_t c = s->chunks;
    while (c > 0 && s->plan[at.k * s->plan_step + c - 1].low >= s->plan[at.k * s->plan_step + c - 1].high) c--;
    while (c-- > 0) {
      const Chunk *chunk = s->plan + at.k * s->plan_step + c;
      memset(room.sum_B, 0, (chunk->high - chunk->low) * N * sizeof(V));
      memset(room.sum_C, 0, (chunk->high - chunk->low) * N * sizeof(V));
      for (int64_t strip = from; strip < to; strip++) {
        V D[STRIP_VECTORS], bias[STRIP_VECTORS], dD[STRIP_VECTORS], dbias[STRIP_VECTORS];
        V *q = room.carry + (strip - from) * N * STRIP_VECTORS;
        at.e = strip * STRIP;
        at.width = s->width - at.e < STRIP ? s->width - at.e : STRIP;
        const int64_t parameter = (at.b * s->directions + at.k) * channels + channel(s, &at);
        float *dA = s->dA + ((at.b * s->directions + at.k) * s->groups + at.g) * N * s->width + at.e;
        read_parameters(s, &at, room.A, D, bias);
        for (int64_t n = 0; n < N; n++) load(room.dA + n * STRIP_VECTORS, dA + n * s->width, at.width);
        load(dD, s->dD + parameter, at.width);
        load(dbias, s->dbias + parameter, at.width);
        if (chunk->flags & 2) read_state(s, &at, chunk, s->grad_last, q);
        recompute(s, &at, chunk, c, bias, &room);
        adjoint_chunk(s, &at, chunk, D, q, dD, dbias, &room);
        if (chunk->flags & 1 && s->dinitial) write_state(s, &at, chunk, s->dinitial, q);
        for (int64_t n = 0; n < N; n++) store(dA + n * s->width, room.dA + n * STRIP_VECTORS, at.width);
        store(s->dD + parameter, dD, at.width);
        store(s->dbias + parameter, dbias, at.width);
      }
      add_sums(s, &at, chunk, &room, room.sum_B, &s->B, s->dB, part);
      add_sums(s, &at, chunk, &room, room.sum_C, &s->C, s->dC, part);
    }
  }
}

int64_t genssm_scan_size(void) { return sizeof(Scan); }

int genssm_scan_forward(const Scan *s) {
  const int64_t strips = (s->width + STRIP - 1) / STRIP;
  const size_t bytes = 2 * s->states * STRIP * sizeof(float);
  return for_each(s->batch * s->groups * strips, (int)s->threads, bytes, forward_strip, s);
}

int genssm_scan_backward(const Scan *s) {
  const int64_t strips = (s->width + STRIP - 1) / STRIP;
  Room room;
  const size_t bytes = lay_out(s, (strips + s->parts - 1) / s->parts + 1, NULL, &room);
  return for_each(s->batch * s->groups * s->parts, (int)s->threads, bytes, backward_part, s);
}
