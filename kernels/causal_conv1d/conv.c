/* Causal depthwise convolution along orders for the CPU: forward and adjoint, float32. compiled.py prepares the
 * arguments.
 *
 * A strip of neighbouring channels walks along the order with its last W tokens at hand. The adjoint walks backwards:
 * it slides the same window the other way, so it needs nothing that the forward kept. */

#include "vectors.c"

#define MAX_TAPS 8

typedef struct {
  int32_t low, high; /* steps of a sequence */
  int32_t sequence;  /* of a packed batch, or -1: the batch row */
  int32_t unused;
} Run;

typedef struct {
  int64_t batch, directions, length, channels, taps;
  int64_t runs, plan_step; /* sequences of a direction; plan entries from one direction to the next, 0 where shared */
  int64_t silu, threads, x_directions;
  const float *x, *grad_out;                 /* (Bt, 1 or K, L, E) by strides, dense in E */
  int64_t x_batch, x_direction, x_row;       /* in floats */
  int64_t grad_batch, grad_direction, grad_row;
  int64_t out_batch, out_direction, out_row, dx_batch, dx_direction, dx_row;
  const float *weight, *bias;                /* (1 or K, W, E), (1 or K, E) or NULL */
  int64_t weight_step, bias_step;            /* floats from one direction to the next, 0 where shared */
  const Run *plan;                           /* (1 or K, runs) */
  const int32_t *orders, *lengths;           /* (K, L), (Bt,) or NULL */
  const float *initial, *grad_last;          /* (S, K, E, W - 1) or NULL */
  float *out, *last;                         /* (Bt, K, L, E) by strides, (S, K, E, W - 1) */
  float *dx;                                 /* (Bt, 1 or K, L, E) by strides */
  float *dweight, *dbias, *dinitial;         /* (Bt, K, W, E), (Bt, K, E), (S, K, E, W - 1) or NULL */
} Conv;

#define EACH(v) for (int v = 0; v < STRIP_VECTORS; v++)

typedef struct {
  int64_t b, k, e, width;
  V weight[MAX_TAPS][STRIP_VECTORS], bias[STRIP_VECTORS];
} Strip;

static Strip strip_of(const Conv *c, int64_t item) {
  const int64_t strips = (c->channels + STRIP - 1) / STRIP;
  Strip at = {.b = item / strips, .e = item % strips * STRIP};
  at.width = c->channels - at.e < STRIP ? c->channels - at.e : STRIP;
  return at;
}

static void read_parameters(const Conv *c, Strip *at) {
  const float *weight = c->weight + at->k * c->weight_step + at->e;
  for (int64_t j = 0; j < c->taps; j++) load(at->weight[j], weight + j * c->channels, at->width);
  if (c->bias) load(at->bias, c->bias + at->k * c->bias_step + at->e, at->width);
  else memset(at->bias, 0, sizeof at->bias);
}

INLINE int64_t visited(const Conv *c, const Strip *at, int64_t step) {
  return c->orders ? c->orders[at->k * c->length + step] : step;
}

INLINE int valid(const Conv *c, const Strip *at, int64_t row) { return !c->lengths || row < c->lengths[at->b]; }

/* Offset of entry ``j`` of a strip's state in (S, K, E, W - 1); neighbouring channels lie W - 1 apart. */
INLINE int64_t state_of(const Conv *c, const Strip *at, const Run *run, int64_t j) {
  int64_t sequence = run->sequence < 0 ? at->b : run->sequence;
  return ((sequence * c->directions + at->k) * c->channels + at->e) * (c->taps - 1) + j;
}

static void read_state(const Conv *c, const Strip *at, const Run *run, const float *states, int64_t j, V *to) {
  memset(to, 0, STRIP * sizeof(float));
  if (states == NULL) return;
  states += state_of(c, at, run, j);
  for (int64_t e = 0; e < at->width; e++) ((float *)to)[e] = states[e * (c->taps - 1)];
}

static void write_state(const Conv *c, const Strip *at, const Run *run, float *states, int64_t j, const V *from) {
  states += state_of(c, at, run, j);
  for (int64_t e = 0; e < at->width; e++) states[e * (c->taps - 1)] = ((const float *)from)[e];
}

/* The token of a step: before the sequence, its state; behind the lengths, zeros. */
INLINE void read_token(const Conv *c, const Strip *at, const Run *run, int64_t step, V *to) {
  if (step < run->low) {
    read_state(c, at, run, c->initial, step - run->low + c->taps - 1, to);
    return;
  }
  const int64_t row = visited(c, at, step);
  if (valid(c, at, row)) load(to, c->x + at->b * c->x_batch + at->k * c->x_direction + row * c->x_row + at->e, at->width);
  else memset(to, 0, STRIP * sizeof(float));
}

INLINE void convolve(const Conv *c, const Strip *at, V window[][STRIP_VECTORS], V *y) {
  EACH(v) y[v] = at->bias[v];
  for (int64_t j = 0; j < c->taps; j++) EACH(v) y[v] += at->weight[j][v] * window[j][v];
}

static void forward_strip(const void *argument, int64_t item, void *memory) {
  const Conv *c = argument;
  Strip at = strip_of(c, item);
  (void)memory;
  for (at.k = 0; at.k < c->directions; at.k++) {
    read_parameters(c, &at);
    for (int64_t r = 0; r < c->runs; r++) {
      const Run *run = c->plan + at.k * c->plan_step + r;
      V window[MAX_TAPS][STRIP_VECTORS], y[STRIP_VECTORS];
      for (int64_t j = 1; j < c->taps; j++) read_token(c, &at, run, run->low - c->taps + j, window[j]);
      for (int64_t step = run->low; step < run->high; step++) {
        const int64_t row = visited(c, &at, step);
        for (int64_t j = 1; j < c->taps; j++) EACH(v) window[j - 1][v] = window[j][v];
        read_token(c, &at, run, step, window[c->taps - 1]);
        if (valid(c, &at, row)) {
          convolve(c, &at, window, y);
          if (c->silu) EACH(v) y[v] *= sigmoid_(y[v]);
        } else {
          memset(y, 0, sizeof y);
        }
        store(c->out + at.b * c->out_batch + at.k * c->out_direction + row * c->out_row + at.e, y, at.width);
      }
      for (int64_t j = 1; j < c->taps; j++) write_state(c, &at, run, c->last, j - 1, window[j]);
    }
  }
}

static void backward_strip(const void *argument, int64_t item, void *memory) {
  const Conv *c = argument;
  const int64_t taps = c->taps;
  Strip at = strip_of(c, item);
  (void)memory;
  for (at.k = 0; at.k < c->directions; at.k++) {
    V dweight[MAX_TAPS][STRIP_VECTORS] = {{{0}}}, dbias[STRIP_VECTORS] = {{0}};
    read_parameters(c, &at);
    for (int64_t r = 0; r < c->runs; r++) {
      const Run *run = c->plan + at.k * c->plan_step + r;
      V window[MAX_TAPS][STRIP_VECTORS];                /* tokens step - W + 1 .. step */
      V grads[MAX_TAPS][STRIP_VECTORS] = {{{0}}};       /* of the results of step .. step + W - 1, before the activation */
      for (int64_t j = 1; j < taps; j++) read_token(c, &at, run, run->high - taps + j, window[j - 1]);
      for (int64_t step = run->high - 1; step > run->low - taps; step--) {
        const int inside = step >= run->low;
        const int64_t row = inside ? visited(c, &at, step) : 0;
        V dx[STRIP_VECTORS] = {{0}};
        for (int64_t j = taps - 1; j > 0; j--) EACH(v) {
            window[j][v] = window[j - 1][v];
            grads[j][v] = grads[j - 1][v];
          }
        memset(grads[0], 0, sizeof grads[0]);
        if (inside && valid(c, &at, row)) {
          read_token(c, &at, run, step - taps + 1, window[0]);
          load(grads[0], c->grad_out + at.b * c->grad_batch + at.k * c->grad_direction + row * c->grad_row + at.e, at.width);
          if (c->silu) {
            V y[STRIP_VECTORS];
            convolve(c, &at, window, y);
            EACH(v) {
              V sigmoid = sigmoid_(y[v]);
              grads[0][v] *= sigmoid * (1.0f + y[v] * (1.0f - sigmoid));
            }
          }
          for (int64_t j = 0; j < taps; j++) EACH(v) dweight[j][v] += grads[0][v] * window[j][v];
          EACH(v) dbias[v] += grads[0][v];
        } else if (inside) {
          read_token(c, &at, run, step - taps + 1, window[0]);
        }
        for (int64_t j = 0; j < taps; j++) EACH(v) dx[v] += at.weight[taps - 1 - j][v] * grads[j][v];
        if (c->grad_last && step > run->high - taps) {
          V more[STRIP_VECTORS];
          read_state(c, &at, run, c->grad_last, step - run->high + taps - 1, more);
          EACH(v) dx[v] += more[v];
        }
        if (inside) {
          if (!valid(c, &at, row)) memset(dx, 0, sizeof dx);
          put(c->dx + at.b * c->dx_batch + at.k * c->dx_direction + row * c->dx_row + at.e, dx, at.width,
              c->x_directions == 1 && at.k);
        } else if (c->dinitial) {
          write_state(c, &at, run, c->dinitial, step - run->low + taps - 1, dx);
        }
      }
    }
    const int64_t place = at.b * c->directions + at.k;
    for (int64_t j = 0; j < taps; j++) store(c->dweight + (place * taps + j) * c->channels + at.e, dweight[j], at.width);
    store(c->dbias + place * c->channels + at.e, dbias, at.width);
  }
}

int64_t genssm_conv_size(void) { return sizeof(Conv); }

static int run_strips(const Conv *c, void (*work)(const void *, int64_t, void *)) {
  const int64_t strips = (c->channels + STRIP - 1) / STRIP;
  return for_each(c->batch * strips, (int)c->threads, 0, work, c);
}

int genssm_conv_forward(const Conv *c) { return run_strips(c, forward_strip); }

int genssm_conv_backward(const Conv *c) { return run_strips(c, backward_strip); }
