/* What the compiled backends share: vectors of 16 floats, their elementary functions, and a parallel loop.
 *
 * GCC and Clang lower these vectors to whatever the machine has (AVX-512, AVX2, SSE, NEON). The functions are written
 * out, so no vector maths library and no -ffast-math is needed: infinities and NaN keep their meaning, and linking
 * does not switch the whole process to flushing denormals, as -ffast-math does. */

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 16
#define LOG2E 1.44269504088896341f
#define LN2 0.69314718055994531f

typedef float V __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t I __attribute__((vector_size(LANES * sizeof(float))));

#define INLINE static inline __attribute__((always_inline))

INLINE V splat(float x) { return x - (V){0}; }
INLINE V blend(I mask, V yes, V no) { return (V)(((I)yes & mask) | ((I)no & ~mask)); }

/* x limited to low .. high; NaN stays NaN. The instructions are named because C has no vector ?: to make them from. */
#if defined(__AVX512F__)
INLINE V limit(V x, float low, float high) {
  return (V)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
}
#elif defined(__AVX__)
INLINE V limit(V x, float low, float high) {
  __m256 half[2];
  memcpy(half, &x, sizeof x);
  for (int i = 0; i < 2; i++)
    half[i] = _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), half[i]));
  memcpy(&x, half, sizeof x);
  return x;
}
#else
INLINE V limit(V x, float low, float high) {
  x = blend(x < low, splat(low), x);
  return blend(x > high, splat(high), x);
}
#endif

/* 2^x to about 2e-7 for x in [-126, 128), 1 at 0 exactly; the ends outside, NaN for NaN. */
INLINE V exp2_(V x) {
  const V magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits */
  x = limit(x, -126.0f, 127.49f);
  V shifted = x + magic;
  V f = x - (shifted - magic); /* -1/2 .. 1/2 */
  V p = f * 1.5345810e-4f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 0.240226462f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  return p * (V)(((I)shifted << 23) + 0x3f800000);
}

INLINE V exp_(V x) { return exp2_(x * LOG2E); }

INLINE V sigmoid_(V x) { return 1.0f / (1.0f + exp_(-x)); }

/* log(1 + y) for y >= 0 to about 2e-7. */
INLINE V log1p_(V y) {
  V w = 1.0f + y;
  I bits = (I)w;
  I exponent = (bits >> 23) - 127;
  V m = (V)((bits & 0x007fffff) | 0x3f800000); /* 1 .. 2 */
  I large = m > 1.41421356f;
  m = blend(large, m * 0.5f, m);
  exponent -= large; /* a true lane is -1 */
  V s = (m - 1.0f) / (m + 1.0f), t = s * s;
  V p = ((t * 0.29925194f + 0.3997482f) * t + 0.66666816f) * t + 2.0f;
  return __builtin_convertvector(exponent, V) * LN2 + s * p + (y - (w - 1.0f)) / w;
}

INLINE V softplus_(V x) {
  V soft = log1p_(exp_(x));
  return blend(x > 20.0f, x, blend(x == x, soft, x));
}

typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));

INLINE float lanes_sum(V x) {
  V8 eight[2];
  memcpy(eight, &x, sizeof x);
  eight[0] += eight[1];
  V4 four[2];
  memcpy(four, eight, sizeof four);
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* A strip is a run of neighbouring channels; a narrow one is filled up with zeros. */
#define STRIP_VECTORS 2
#define STRIP (STRIP_VECTORS * LANES)

INLINE void load(V *to, const float *from, int64_t width) {
  if (width >= STRIP) {
    memcpy(to, from, STRIP * sizeof(float));
  } else {
    memset(to, 0, STRIP * sizeof(float));
    memcpy(to, from, width * sizeof(float));
  }
}

/* Rows lie further apart than the hardware looks ahead. */
INLINE void fetch(const float *from) {
  for (int v = 0; v < STRIP_VECTORS; v++) __builtin_prefetch(from + v * LANES);
}

INLINE void store(float *to, const V *from, int64_t width) {
  memcpy(to, from, (width >= STRIP ? STRIP : width) * sizeof(float));
}

/* Write a strip, or add it to what stands there. */
INLINE void put(float *to, const V *from, int64_t width, int add) {
  if (add) {
    V old[STRIP_VECTORS];
    load(old, to, width);
    for (int v = 0; v < STRIP_VECTORS; v++) old[v] += from[v];
    store(to, old, width);
  } else {
    store(to, from, width);
  }
}

static void *workspace(size_t bytes) {
  void *memory = NULL;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}

/* Call work(argument, item, workspace) for every item, on up to ``threads`` threads with a workspace each. Items do not
 * share results, so the outcome does not depend on who takes which. Returns 1 when there is no memory. */
static int for_each(int64_t items, int threads, size_t bytes, void (*work)(const void *, int64_t, void *),
                    const void *argument) {
  atomic_llong next = 0;
  atomic_int failed = 0;
  if (threads > items) threads = (int)items;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    void *memory = workspace(bytes);
    if (memory == NULL) atomic_store(&failed, 1);
    for (int64_t item; memory != NULL && (item = atomic_fetch_add(&next, 1)) < items;) work(argument, item, memory);
    free(memory);
  }
  return atomic_load(&failed);
}
