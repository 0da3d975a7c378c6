/* int8 encoder layers for x86-64 with AMX or AVX-512 VNNI, one unpadded sample at a time.
 *
 * The arithmetic of the int8 segments (export/graph.py), operator by operator: activations quantized to uint8
 * with one scale for each tensor of a sample, int8 weights with one scale for each output, everything else in
 * float32. ONNX Runtime runs the same graph as a dozen operators that each read and write memory and quantize
 * or dequantize on the way; here each matrix product ends in what follows it (scale, bias, GELU, residual).
 *
 * Layouts: hidden states are float32 (tokens, hidden), row by row. A weight (inputs, outputs) is packed into
 * AMX tiles of 64 inputs by 16 outputs. A model is built once and then only read, so threads share it; each
 * thread has a scratch buffer of its own. Sums of int8 products are exact, so AMX and VNNI give the same bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__x86_64__) || !defined(__linux__)
#define MISSING "kernels are for Linux on x86-64 only"
#elif (defined(__clang__) && __clang_major__ < 12) || (!defined(__clang__) && __GNUC__ < 11)
#define MISSING "they were built with a compiler that knows no AMX: build again with gcc 11 or clang 12, or newer"
#warning "This compiler knows no AMX: the kernels are left out, and ONNX Runtime runs every model, at half the speed."
#else
#define HAVE_KERNELS 1
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CAPSULE "native.Model"
#define MAX_LAYERS 100
#define ROUND_UP(n, to) (((n) + (to)-1) / (to) * (to))

typedef struct {
    int in, out;
    int8_t *tiles;   /* (out / 16, in / 64) tiles of 1024 bytes */
    float *scale;    /* (out) */
    float *bias;     /* (out) */
    float *sums;     /* (out): sum of the weights of an output, for the activations' zero point */
} Linear;

typedef struct {
    float *scale, *shift;
    float epsilon;
} Norm;

typedef struct {
    int is_set, labels, metric;
    float *classifier, *bias; /* (labels, hidden), (labels) */
    Linear space;             /* metric 0: no prototypes */
} Exit;

typedef struct {
    Linear qkv, out, up, down;
    Norm after_attention, after_ffn;
} Layer;

typedef struct {
    int hidden, heads, inner, layers, gelu, mean;
    int words, positions, types;
    int8_t *word;                              /* (words, hidden) */
    float *word_scale, *position, *type;       /* (words), (positions, hidden), (types, hidden) */
    Norm norm;
    Layer layer[MAX_LAYERS + 1];               /* from 1 */
    Exit exit[MAX_LAYERS + 1];                 /* from 0 */
} Model;

/* ---- machine ---------------------------------------------------------------------------------------- */

enum { NOTHING, VNNI, AMX };

static int found = -1; /* what supported() found */
static int used;       /* what the kernels use: that, or less for a test */

static int supported(void) {
    unsigned a, b, c, d, features, low, high;
    if (found >= 0) return found;
    found = used = NOTHING;
    if (!__get_cpuid(1, &a, &b, &features, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31); /* F, DQ, BW, VL */
    if ((b & avx512) != avx512 || !(c & (1u << 11)) || !(features & (1u << 27))) return found; /* VNNI, OSXSAVE */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0xe6) != 0xe6) return found; /* the system keeps AVX-512 registers */
    found = used = VNNI;
    /* Linux gives tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    if ((d & (1u << 24)) && (d & (1u << 25)) && syscall(SYS_arch_prctl, 0x1023, 18) == 0) found = used = AMX;
    return found;
}

static pthread_key_t buffer_key;
static pthread_once_t buffer_once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&buffer_key, free); }

/* A buffer for the calling thread, at least so large; kept for its next call, freed at its end. */
static void *scratch(size_t bytes) {
    static __thread void *buffer;
    static __thread size_t size;
    if (bytes > size) {
        pthread_once(&buffer_once, make_key);
        free(buffer);
        size = ROUND_UP(bytes + bytes / 4, 4096);
        buffer = aligned_alloc(64, size);
        if (buffer == NULL) size = 0;
        pthread_setspecific(buffer_key, buffer);
    }
    return buffer;
}

/* Only what is below here, and only once supported() said yes, runs these instructions. */
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8")
#endif

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16]; /* bytes */
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

static void configure_tiles(void) {
    if (used != AMX) return;
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.columns[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

static void release_tiles(void) {
    if (used == AMX) _tile_release();
}

/* ---- elementwise ------------------------------------------------------------------------------------ */

static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* ½·x·(1 + erf(x/√2)); erf as a rational function, fitted to 3e-7 on [-4, 4], where float32 reaches ±1. */
static inline __m512 gelu16(__m512 x) {
    __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(0.707106781f));
    y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(-4.0f)), _mm512_set1_ps(4.0f));
    __m512 u = _mm512_mul_ps(y, y);
    __m512 p = _mm512_set1_ps(1.9867894166789307e-06f);
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.0002845639752402275f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.003883275895802294f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.05310153637721895f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.19354353274552474f));
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(1.128379139396274f));
    __m512 q = _mm512_set1_ps(3.7420146291437546e-05f);
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(0.0011855538438856074f));
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(0.015207115847981591f));
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(0.11534936098275016f));
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(0.504856046231757f));
    q = _mm512_fmadd_ps(q, u, _mm512_set1_ps(1.0f));
    /* 1/q by an estimate of 14 bits and one Newton step. */
    __m512 inverse = _mm512_rcp14_ps(q);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(q, inverse, _mm512_set1_ps(2.0f)));
    __m512 erf = _mm512_mul_ps(_mm512_mul_ps(y, p), inverse);
    __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(half, erf, half);
}

static void layer_norm(float *rows, int tokens, int hidden, const Norm *norm) {
    for (int t = 0; t < tokens; t++) {
        float *x = rows + (size_t)t * hidden;
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < hidden; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / hidden), square = _mm512_setzero_ps();
        for (int i = 0; i < hidden; i += 16) {
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
            square = _mm512_fmadd_ps(d, d, square);
        }
        __m512 inverse = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / hidden + norm->epsilon));
        for (int i = 0; i < hidden; i += 16) {
            __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), inverse);
            _mm512_storeu_ps(x + i, _mm512_fmadd_ps(d, _mm512_loadu_ps(norm->scale + i),
                                                    _mm512_loadu_ps(norm->shift + i)));
        }
    }
}

/* ---- int8 ------------------------------------------------------------------------------------------- */

typedef struct {
    float scale;
    int zero;
} Scale;

/* ONNX's DynamicQuantizeLinear: the range of the values, with 0 in it, onto 0 … 255. */
static Scale scale_of(__m512 low, __m512 high) {
    float min = fminf(_mm512_reduce_min_ps(low), 0.0f), max = fmaxf(_mm512_reduce_max_ps(high), 0.0f);
    Scale s = {.scale = max == min ? 1.0f : (max - min) / 255.0f};
    s.zero = (int)nearbyintf(fminf(fmaxf(-min / s.scale, 0.0f), 255.0f));
    return s;
}

static Scale range_of(const float *x, size_t count) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (size_t i = 0; i < count; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        low = _mm512_min_ps(low, v);
        high = _mm512_max_ps(high, v);
    }
    return scale_of(low, high);
}

static void quantize(const float *x, size_t count, Scale s, uint8_t *to) {
    __m512 inverse = _mm512_set1_ps(1.0f / s.scale);
    __m512i zero = _mm512_set1_epi32(s.zero), none = _mm512_setzero_si512();
    for (size_t i = 0; i < count; i += 16) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        q = _mm512_max_epi32(_mm512_add_epi32(q, zero), none);
        _mm_storeu_si128((__m128i *)(to + i), _mm512_cvtusepi32_epi8(q));
    }
}

enum { PLAIN, GELU, RELU, RESIDUAL };

typedef struct {
    const Linear *w;
    Scale scale;
    int tokens, then;
    const float *residual; /* (tokens, out) */
    float *to;             /* (tokens, out) */
    __m512 low, high;      /* range of what was written, for the next quantization */
} Product;

/* What follows a product: scale, bias, and GELU, ReLU or the residual; for `rows` rows and 16 outputs of a tile. */
static inline __attribute__((always_inline)) void finish(Product *p, const int32_t *tile, int row, int column,
                                                         int rows, int then) {
    const Linear *w = p->w;
    __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w->scale + column), _mm512_set1_ps(p->scale.scale));
    __m512 bias = _mm512_loadu_ps(w->bias + column);
    /* zero·sums are whole numbers below 2^30, for up to 32768 inputs: exact as int32. */
    __m512i offset = _mm512_mullo_epi32(_mm512_set1_epi32(p->scale.zero),
                                        _mm512_cvtps_epi32(_mm512_loadu_ps(w->sums + column)));
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(row + r) * w->out + column;
        __m512i sum = _mm512_sub_epi32(_mm512_load_si512(tile + 16 * r), offset);
        __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias);
        if (then == GELU) v = gelu16(v);
        if (then == RELU) v = _mm512_max_ps(v, _mm512_setzero_ps());
        if (then == RESIDUAL) v = _mm512_add_ps(v, _mm512_loadu_ps(p->residual + at));
        if (then == GELU || then == RELU) {
            p->low = _mm512_min_ps(p->low, v);
            p->high = _mm512_max_ps(p->high, v);
        }
        _mm512_storeu_ps(p->to + at, v);
    }
}

static void finish_tile(Product *p, const int32_t *tile, int row, int column, int rows) {
    switch (p->then) {
    case PLAIN: finish(p, tile, row, column, rows, PLAIN); break;
    case GELU: finish(p, tile, row, column, rows, GELU); break;
    case RELU: finish(p, tile, row, column, rows, RELU); break;
    default: finish(p, tile, row, column, rows, RESIDUAL);
    }
}

/* Without AMX: so many rows by 32 outputs, 4 inputs at a time, from the same tiles. With 12 rows, 24 sums, two
 * weights and an input fill the registers; each number of rows has a loop of its own, so that no row is wasted. */
enum { VNNI_ROWS = 12 };

static inline __attribute__((always_inline)) void multiply(const uint8_t *x, const Linear *w, int column,
                                                           int32_t (*tile)[256], int rows) {
    const int8_t *left = w->tiles + (size_t)column * w->in, *right = left + (size_t)w->in * 16;
    __m512i sum[VNNI_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int k = 0; k < w->in; k += 4) {
        __m512i l = _mm512_load_si512(left + (size_t)k * 16), h = _mm512_load_si512(right + (size_t)k * 16);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + (size_t)r * w->in + k, 4);
            __m512i v = _mm512_set1_epi32(four);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], v, l);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], v, h);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_store_si512(tile[0] + 16 * r, sum[r][0]);
        _mm512_store_si512(tile[1] + 16 * r, sum[r][1]);
    }
}

static void product_vnni(const uint8_t *x, Product *p) {
    const Linear *w = p->w;
    int32_t tile[2][256] __attribute__((aligned(64)));
    int blocks = (p->tokens + VNNI_ROWS - 1) / VNNI_ROWS;
    for (int column = 0; column < w->out; column += 32) {
        for (int block = 0; block < blocks; block++) {
            int row = p->tokens * block / blocks, rows = p->tokens * (block + 1) / blocks - row;
            const uint8_t *from = x + (size_t)row * w->in;
            switch (rows) {
#define CASE(n) case n: multiply(from, w, column, tile, n); break
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
                CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#undef CASE
            }
            finish_tile(p, tile[0], row, column, rows);
            finish_tile(p, tile[1], row, column + 16, rows);
        }
    }
}

/* to = x·W + b and what follows it; x is uint8 (tokens rounded up to 16, in). */
static void product(const uint8_t *x, Product *p) {
    const Linear *w = p->w;
    int blocks = w->in / 64;
    int32_t tile[4][256] __attribute__((aligned(64)));
    p->low = p->high = _mm512_setzero_ps();
    if (used != AMX) {
        product_vnni(x, p);
        return;
    }
    for (int column = 0; column < w->out; column += 32) {
        const int8_t *left = w->tiles + (size_t)(column / 16) * blocks * 1024, *right = left + blocks * 1024;
        for (int row = 0; row < p->tokens; row += 32) {
            const uint8_t *upper = x + (size_t)row * w->in;
            if (p->tokens - row > 16) {
                const uint8_t *lower = upper + (size_t)16 * w->in;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int b = 0; b < blocks; b++) {
                    _tile_loadd(4, upper + b * 64, w->in);
                    _tile_loadd(6, left + b * 1024, 64);
                    _tile_loadd(7, right + b * 1024, 64);
                    _tile_loadd(5, lower + b * 64, w->in);
                    _tile_dpbusd(0, 4, 6);
                    _tile_dpbusd(1, 4, 7);
                    _tile_dpbusd(2, 5, 6);
                    _tile_dpbusd(3, 5, 7);
                }
                _tile_stored(2, tile[2], 64);
                _tile_stored(3, tile[3], 64);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                for (int b = 0; b < blocks; b++) {
                    _tile_loadd(4, upper + b * 64, w->in);
                    _tile_loadd(6, left + b * 1024, 64);
                    _tile_loadd(7, right + b * 1024, 64);
                    _tile_dpbusd(0, 4, 6);
                    _tile_dpbusd(1, 4, 7);
                }
            }
            _tile_stored(0, tile[0], 64);
            _tile_stored(1, tile[1], 64);
            int rows = p->tokens - row < 16 ? p->tokens - row : 16;
            finish_tile(p, tile[0], row, column, rows);
            finish_tile(p, tile[1], row, column + 16, rows);
            if (p->tokens - row > 16) {
                rows = p->tokens - row < 32 ? p->tokens - row - 16 : 16;
                finish_tile(p, tile[2], row + 16, column, rows);
                finish_tile(p, tile[3], row + 16, column + 16, rows);
            }
        }
    }
}

/* ---- attention -------------------------------------------------------------------------------------- */

/* Rows of a block. Its loops have constant bounds, so that the sums stay in registers; with two vectors of 16
 * columns there are 8 independent sums, as many as the units' latency asks for. */
enum { ROWS = 4 };

/* scores[r][j] = factor · q[r]·k[j] for 16·vectors keys from keys (width, wide) on. */
static inline __attribute__((always_inline)) void score(const float *const *q, const float *keys, int width,
                                                        int wide, __m512 factor, int vectors, float *scores) {
    __m512 s[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vectors; c++) s[r][c] = _mm512_setzero_ps();
    for (int d = 0; d < width; d++) {
        __m512 key[2];
        for (int c = 0; c < vectors; c++) key[c] = _mm512_loadu_ps(keys + (size_t)d * wide + 16 * c);
        for (int r = 0; r < ROWS; r++) {
            __m512 x = _mm512_set1_ps(q[r][d]);
            for (int c = 0; c < vectors; c++) s[r][c] = _mm512_fmadd_ps(x, key[c], s[r][c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vectors; c++)
            _mm512_storeu_ps(scores + (size_t)r * wide + 16 * c, _mm512_mul_ps(s[r][c], factor));
}

/* to[r] = Σ_j scores[r][j]·v[j] · inverse[r] for 16·vectors columns of the first `rows` rows. */
static inline __attribute__((always_inline)) void mix(const float *scores, int wide, const float *v, int stride,
                                                      int tokens, const __m512 *inverse, int vectors, float *to,
                                                      int hidden, int rows) {
    __m512 s[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vectors; c++) s[r][c] = _mm512_setzero_ps();
    for (int j = 0; j < tokens; j++) {
        __m512 value[2];
        for (int c = 0; c < vectors; c++) value[c] = _mm512_loadu_ps(v + (size_t)j * stride + 16 * c);
        for (int r = 0; r < ROWS; r++) {
            __m512 x = _mm512_set1_ps(scores[(size_t)r * wide + j]);
            for (int c = 0; c < vectors; c++) s[r][c] = _mm512_fmadd_ps(x, value[c], s[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            _mm512_storeu_ps(to + (size_t)r * hidden + 16 * c, _mm512_mul_ps(s[r][c], inverse[r]));
}

/* keys[d][t] = k[t][d] for a head, in blocks of 16 by 16 that stay in the first cache; past the end zeros. */
static void transpose(const float *k, int stride, int tokens, int width, int wide, float *keys) {
    for (int t0 = 0; t0 < wide; t0 += 16)
        for (int d = 0; d < width; d++) {
            float *to = keys + (size_t)d * wide + t0;
            int real = tokens - t0 < 16 ? tokens - t0 : 16;
            for (int t = 0; t < real; t++) to[t] = k[(size_t)(t0 + t) * stride + d];
            for (int t = real; t < 16; t++) to[t] = 0.0f;
        }
}

/* softmax(Q·Kᵀ/√width)·V for every head; qkv is (tokens, 3·hidden), to is (tokens, hidden). keys: scratch for
 * (width, wide) floats, scores: for (ROWS, wide), wide being the tokens rounded up to 16. */
static void attention(const float *qkv, int tokens, int hidden, int heads, float *keys, float *scores,
                      float *to) {
    int width = hidden / heads, wide = ROUND_UP(tokens, 16), stride = 3 * hidden;
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf((float)width)), least = _mm512_set1_ps(-INFINITY);
    __mmask16 last = (__mmask16)(0xFFFFu >> (wide - tokens));
    for (int h = 0; h < heads; h++) {
        const float *q = qkv + h * width, *k = q + hidden, *v = k + hidden;
        transpose(k, stride, tokens, width, wide, keys);
        for (int t = 0; t < tokens; t += ROWS) {
            int rows = tokens - t < ROWS ? tokens - t : ROWS;
            const float *row[ROWS]; /* past the end: the last row once more */
            __m512 inverse[ROWS];
            for (int r = 0; r < ROWS; r++) row[r] = q + (size_t)(r < rows ? t + r : tokens - 1) * stride;
            int j = 0;
            for (; j + 32 <= wide; j += 32) score(row, keys + j, width, wide, factor, 2, scores + j);
            if (j < wide) score(row, keys + j, width, wide, factor, 1, scores + j);
            for (int r = 0; r < ROWS; r++) {
                float *s = scores + (size_t)r * wide;
                __m512 tail = _mm512_mask_mov_ps(least, last, _mm512_loadu_ps(s + wide - 16));
                __m512 max = tail, total = _mm512_setzero_ps();
                for (int i = 0; i + 16 < wide; i += 16) max = _mm512_max_ps(max, _mm512_loadu_ps(s + i));
                max = _mm512_set1_ps(_mm512_reduce_max_ps(max));
                _mm512_storeu_ps(s + wide - 16, tail);
                for (int i = 0; i < wide; i += 16) {
                    __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(s + i), max));
                    if (i + 16 == wide) e = _mm512_maskz_mov_ps(last, e);
                    total = _mm512_add_ps(total, e);
                    _mm512_storeu_ps(s + i, e);
                }
                inverse[r] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
            }
            int d = 0;
            float *at = to + (size_t)t * hidden + h * width;
            for (; d + 32 <= width; d += 32)
                mix(scores, wide, v + d, stride, tokens, inverse, 2, at + d, hidden, rows);
            if (d < width) mix(scores, wide, v + d, stride, tokens, inverse, 1, at + d, hidden, rows);
        }
    }
}

/* ---- a layer, the embeddings, an exit --------------------------------------------------------------- */

static int run_layer(const Model *m, int number, const float *from, int tokens, float *to) {
    const Layer *layer = &m->layer[number];
    int hidden = m->hidden, padded = ROUND_UP(tokens, 16);
    size_t wide = (size_t)(m->inner > 3 * hidden ? m->inner : 3 * hidden);
    size_t count = (size_t)tokens * hidden;
    size_t large = ROUND_UP(wide * tokens * 4, 64), bytes8 = (size_t)padded * (m->inner > hidden ? m->inner : hidden);
    size_t keys = (size_t)(hidden / m->heads) * padded * 4;
    char *memory = scratch(large + bytes8 + 2 * ROUND_UP(count * 4, 64) + keys + (size_t)padded * 16);
    if (memory == NULL) return -1;
    float *values = (float *)memory;               /* qkv, then the inner layer */
    uint8_t *bytes = (uint8_t *)(memory + large);  /* what is multiplied; the padding's rows are never used */
    float *context = (float *)(memory + large + bytes8);
    float *middle = (float *)((char *)context + ROUND_UP(count * 4, 64));
    float *key = (float *)((char *)middle + ROUND_UP(count * 4, 64)), *scores = key + keys / 4;

    configure_tiles();
    Product p = {.w = &layer->qkv, .scale = range_of(from, count), .tokens = tokens, .to = values};
    quantize(from, count, p.scale, bytes);
    p.then = PLAIN;
    product(bytes, &p);
    attention(values, tokens, hidden, m->heads, key, scores, context);

    p = (Product){.w = &layer->out, .scale = range_of(context, count), .tokens = tokens, .to = middle};
    quantize(context, count, p.scale, bytes);
    p.then = RESIDUAL;
    p.residual = from;
    product(bytes, &p);
    layer_norm(middle, tokens, hidden, &layer->after_attention);

    p = (Product){.w = &layer->up, .scale = range_of(middle, count), .tokens = tokens, .to = values};
    quantize(middle, count, p.scale, bytes);
    p.then = m->gelu ? GELU : RELU;
    product(bytes, &p);

    Scale inner = scale_of(p.low, p.high);
    quantize(values, (size_t)tokens * m->inner, inner, bytes);
    p = (Product){.w = &layer->down, .scale = inner, .tokens = tokens, .to = to, .then = RESIDUAL};
    p.residual = middle;
    product(bytes, &p);
    release_tiles();
    layer_norm(to, tokens, hidden, &layer->after_ffn);
    return 0;
}

static int run_embeddings(const Model *m, const int64_t *ids, const int64_t *types, int tokens, float *to) {
    for (int t = 0; t < tokens; t++) {
        if (ids[t] < 0 || ids[t] >= m->words || t >= m->positions) return -1;
        if (m->types && (types[t] < 0 || types[t] >= m->types)) return -1;
        const int8_t *word = m->word + (size_t)ids[t] * m->hidden;
        const float *position = m->position + (size_t)t * m->hidden;
        const float *type = m->types ? m->type + (size_t)types[t] * m->hidden : NULL;
        __m512 scale = _mm512_set1_ps(m->word_scale[ids[t]]);
        float *row = to + (size_t)t * m->hidden;
        for (int i = 0; i < m->hidden; i += 16) {
            __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(word + i))));
            v = _mm512_add_ps(_mm512_mul_ps(v, scale), _mm512_loadu_ps(position + i));
            if (type) v = _mm512_add_ps(v, _mm512_loadu_ps(type + i));
            _mm512_storeu_ps(row + i, v);
        }
    }
    layer_norm(to, tokens, m->hidden, &m->norm);
    return 0;
}

static float dot(const float *a, const float *b, int count) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

static int run_exit(const Model *m, int number, const float *from, int tokens, const float *prototypes,
                    float *logits, float *distances) {
    const Exit *leave = &m->exit[number];
    int hidden = m->hidden, metric = leave->metric;
    char *memory = scratch((size_t)hidden * 4 + (size_t)16 * hidden + (size_t)metric * 4 + 256);
    if (memory == NULL) return -1;
    float *pooled = (float *)memory, *embedded = (float *)(memory + ROUND_UP((size_t)hidden * 4, 64));
    uint8_t *bytes = (uint8_t *)embedded + ROUND_UP((size_t)metric * 4, 64);
    if (m->mean) {
        for (int i = 0; i < hidden; i += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int t = 0; t < tokens; t++)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + (size_t)t * hidden + i));
            _mm512_storeu_ps(pooled + i, _mm512_div_ps(sum, _mm512_set1_ps((float)tokens)));
        }
    } else {
        memcpy(pooled, from, (size_t)hidden * 4);
    }
    int finite = 1;
    for (int k = 0; k < leave->labels; k++) {
        logits[k] = leave->bias[k] + dot(pooled, leave->classifier + (size_t)k * hidden, hidden);
        finite = finite && isfinite(logits[k]);
    }
    if (!metric) return 0;
    if (!finite) { /* int8 would make numbers of it */
        for (int k = 0; k < leave->labels; k++) distances[k] = NAN;
        return 0;
    }
    Product p = {.w = &leave->space, .scale = range_of(pooled, hidden), .tokens = 1, .to = embedded};
    quantize(pooled, hidden, p.scale, bytes);
    p.then = PLAIN;
    configure_tiles();
    product(bytes, &p);
    release_tiles();
    float length = sqrtf(dot(embedded, embedded, metric));
    for (int k = 0; k < leave->labels; k++) {
        float cosine = dot(embedded, prototypes + (size_t)k * metric, metric);
        distances[k] = 1.0f - (length == 0 ? 0.0f : cosine / length);
    }
    return 0;
}

/* 4·16 multiply-adds by 16 sums that do not wait for each other, so many times. */
static __attribute__((noinline)) void multiply_vnni(int times) {
    __m512i sum[16], x = _mm512_set1_epi8(1);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
    for (int n = 0; n < times; n++) {
        for (int i = 0; i < 16; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
        __asm__ volatile("" : "+v"(x)); /* so that it is not worked out once for all */
    }
    for (int i = 0; i < 16; i++) __asm__ volatile("" : : "v"(sum[i]));
}

static __attribute__((noinline)) void multiply_amx(int times) {
    for (int n = 0; n < times; n++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
}

/* int8 multiply-adds in a second of one core at its best: of values that are in registers already. */
static double peak(void) {
    struct timespec a, b;
    double count = 0, seconds;
    configure_tiles();
    clock_gettime(CLOCK_MONOTONIC, &a);
    do {
        if (used == AMX) multiply_amx(1000);
        else multiply_vnni(4000);
        count += used == AMX ? 4000 * 16384.0 : 16 * 4000 * 64.0;
        clock_gettime(CLOCK_MONOTONIC, &b);
        seconds = b.tv_sec - a.tv_sec + 1e-9 * (b.tv_nsec - a.tv_nsec);
    } while (seconds < 0.2);
    release_tiles();
    return count / seconds;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* ---- through the layers ------------------------------------------------------------------------------ */

/* Whether exits.rule.read gives an EDR below tau: the same operations in the same order, in float64, and out of
 * reach of fused multiply-adds, so that both come to the same decision (tests/test_native.py). */
static int leaves(const float *logits, const float *distances, int labels, double tau, double lam) {
    int first = 0, second;
    for (int k = 1; k < labels; k++)
        if (logits[k] > logits[first]) first = k;
    double top = logits[first], total = 0.0, sum = 0.0;
    for (int k = 0; k < labels; k++) total += exp(logits[k] - top);
    for (int k = 0; k < labels; k++) sum += exp(logits[k] - top) / total * (logits[k] - top);
    double entropy = (log(total) - sum) / log(labels);
    if (entropy < 0.0) entropy = 0.0;
    if (entropy > 1.0) entropy = 1.0;
    if (lam == 0.0) return entropy < tau;
    if (distances == NULL) return 0;
    second = first == 0 ? 1 : 0;
    for (int k = second + 1; k < labels; k++)
        if (k != first && logits[k] > logits[second]) second = k;
    double r1 = distances[first], r2 = distances[second];
    r1 = r1 < 0.0 ? 0.0 : r1 > 2.0 ? 2.0 : r1;
    r2 = r2 < 0.0 ? 0.0 : r2 > 2.0 ? 2.0 : r2;
    double largest = r1 > r2 ? r1 : r2;
    double ratio = largest != 0.0 ? 0.5 * (1.0 + (r1 - r2) / largest) : 0.5;
    double below = lam * entropy + ratio;
    return (below != 0.0 ? (lam + 1.0) * entropy * ratio / below : 0.0) < tau;
}

/* One text on its way. */
typedef struct {
    const int64_t *ids, *types;
    int tokens, deepest, every, layer; /* every: ask every exit, also at tau 0; layer: where it left, or -1 */
    int is_far;                        /* whether some exit was further from its prototypes than allowed */
    double tau, lam, caution, seconds; /* caution: what tau is multiplied by from then on */
    float *hidden, *logits, *distances; /* (tokens, hidden); (layers + 1, labels) twice */
} Text;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double nearest(const float *distances, int labels) {
    float least = distances[0];
    for (int k = 1; k < labels; k++)
        if (distances[k] < least) least = distances[k];
    return least;
}

/* Take texts through the layers until each has left. All run a layer before any runs the next: a layer's weights
 * come from a far cache once for all of them. Each is computed by itself, so none depends on the others.
 * far: the largest distance to the nearest prototype by layer, or NULL. */
static int run_through(const Model *m, Text *texts, int count, const float *const *prototypes, const double *far) {
    for (int number = 0; number <= m->layers; number++) {
        const Exit *leave = &m->exit[number];
        for (int i = 0; i < count; i++) {
            Text *t = &texts[i];
            if (t->layer >= 0) continue;
            double start = now();
            int failed = number ? run_layer(m, number, t->hidden, t->tokens, t->hidden)
                                : run_embeddings(m, t->ids, t->types, t->tokens, t->hidden);
            if (failed) return -1;
            if (leave->is_set && (t->every || t->tau > 0.0 || number == t->deepest)) {
                float *logits = t->logits + (size_t)number * leave->labels, *distances = NULL;
                if (leave->metric) distances = t->distances + (size_t)number * leave->labels;
                if (run_exit(m, number, t->hidden, t->tokens, prototypes[number], logits, distances)) return -1;
                if (far && leave->metric && !t->is_far && nearest(distances, leave->labels) > far[number]) {
                    t->is_far = 1;
                    t->tau *= t->caution;
                }
                if (number == t->deepest || leaves(logits, distances, leave->labels, t->tau, t->lam))
                    t->layer = number;
            }
            t->seconds += now() - start;
        }
    }
    return 0;
}

/* ---- building a model ------------------------------------------------------------------------------- */

static void *copy_of(const void *from, size_t bytes) {
    void *to = aligned_alloc(64, ROUND_UP(bytes + 64, 64));
    if (to != NULL) memcpy(to, from, bytes);
    return to;
}

static int pack(Linear *linear, int in, int out, const int8_t *w, const float *scale, const float *bias) {
    linear->in = in;
    linear->out = out;
    linear->tiles = aligned_alloc(64, (size_t)in * out);
    linear->scale = copy_of(scale, (size_t)out * 4);
    linear->bias = copy_of(bias, (size_t)out * 4);
    linear->sums = aligned_alloc(64, (size_t)out * 4);
    if (!linear->tiles || !linear->scale || !linear->bias || !linear->sums) return -1;
    for (int n = 0; n < out; n++) {
        int sum = 0;
        for (int k = 0; k < in; k++) {
            int8_t value = w[(size_t)k * out + n];
            sum += value;
            size_t tile = (size_t)(n / 16) * (in / 64) + k / 64;
            linear->tiles[tile * 1024 + (k % 64) / 4 * 64 + (n % 16) * 4 + k % 4] = value;
        }
        linear->sums[n] = (float)sum;
    }
    return 0;
}

static void free_linear(Linear *w) {
    free(w->tiles);
    free(w->scale);
    free(w->bias);
    free(w->sums);
}

static void free_norm(Norm *n) {
    free(n->scale);
    free(n->shift);
}

static void free_model(Model *m) {
    for (int i = 0; i <= m->layers; i++) {
        Layer *l = &m->layer[i];
        Linear *all[] = {&l->qkv, &l->out, &l->up, &l->down, &m->exit[i].space};
        for (int j = 0; j < 5; j++) free_linear(all[j]);
        free_norm(&l->after_attention);
        free_norm(&l->after_ffn);
        free(m->exit[i].classifier);
        free(m->exit[i].bias);
    }
    free_norm(&m->norm);
    free(m->word);
    free(m->word_scale);
    free(m->position);
    free(m->type);
    free(m);
}
#endif

/* ---- Python ----------------------------------------------------------------------------------------- */

/* why_not(): what is missing where supported() gives nothing. */
static PyObject *py_why_not(PyObject *self, PyObject *none) {
#ifdef HAVE_KERNELS
    return PyUnicode_FromString(supported() ? "" : "this processor has neither AMX nor AVX-512 VNNI");
#else
    return PyUnicode_FromString(MISSING);
#endif
}

static PyObject *py_supported(PyObject *self, PyObject *none) {
#ifdef HAVE_KERNELS
    return PyUnicode_FromString((const char *[]){"", "vnni", "amx"}[supported()]);
#else
    return PyUnicode_FromString("");
#endif
}

#ifdef HAVE_KERNELS
/* use(name): for the tests; what supported() gives, or less. */
static PyObject *py_use(PyObject *self, PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    int wanted = strcmp(name, "amx") == 0 ? AMX : strcmp(name, "vnni") == 0 ? VNNI : NOTHING;
    if (wanted == NOTHING || wanted > supported()) {
        PyErr_Format(PyExc_ValueError, "this processor has no %s", name);
        return NULL;
    }
    used = wanted;
    Py_RETURN_NONE;
}

static PyObject *py_peak(PyObject *self, PyObject *none) {
    double rate;
    if (!supported()) {
        PyErr_SetString(PyExc_RuntimeError, "this processor has neither AMX nor AVX-512 VNNI");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    rate = peak();
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(rate);
}

static void destroy(PyObject *capsule) { free_model(PyCapsule_GetPointer(capsule, CAPSULE)); }

static Model *model_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, CAPSULE); }

/* Whether a buffer holds exactly so many elements of so many bytes; else an error is set. */
static int holds(const Py_buffer *buffer, size_t count, size_t size, const char *name) {
    if ((size_t)buffer->len == count * size) return 1;
    PyErr_Format(PyExc_ValueError, "%s: has %zd bytes, expected %zu", name, buffer->len, count * size);
    return 0;
}

static int in_range(const Model *m, int number, int first) {
    if (number >= first && number <= m->layers) return 1;
    PyErr_Format(PyExc_ValueError, "layer %d is not one of %d to %d", number, first, m->layers);
    return 0;
}

static PyObject *py_new(PyObject *self, PyObject *args) {
    int hidden, heads, inner, layers, gelu, mean;
    if (!PyArg_ParseTuple(args, "iiiipp", &hidden, &heads, &inner, &layers, &gelu, &mean)) return NULL;
    if (hidden < 64 || hidden % 64 || hidden > 8192 || inner < 64 || inner % 64 || inner > 32768 || heads < 1 ||
        hidden % heads || (hidden / heads) % 16 || layers < 1 || layers > MAX_LAYERS) {
        PyErr_SetString(PyExc_ValueError, "these sizes have no kernels");
        return NULL;
    }
    if (!supported()) {
        PyErr_SetString(PyExc_RuntimeError, "this processor has neither AMX nor AVX-512 VNNI");
        return NULL;
    }
    Model *m = calloc(1, sizeof(Model));
    if (m == NULL) return PyErr_NoMemory();
    *m = (Model){.hidden = hidden, .heads = heads, .inner = inner, .layers = layers, .gelu = gelu, .mean = mean};
    PyObject *capsule = PyCapsule_New(m, CAPSULE, destroy);
    if (capsule == NULL) free_model(m);
    return capsule;
}

/* set_linear(model, layer, which, weight (in, out) int8, scale (out), bias (out)) */
static PyObject *py_set_linear(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, which;
    Py_buffer w, scale, bias;
    if (!PyArg_ParseTuple(args, "Oiiy*y*y*", &capsule, &number, &which, &w, &scale, &bias)) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m, number, 1);
    if (ok && (which < 0 || which > 3)) {
        PyErr_SetString(PyExc_ValueError, "which must be 0 (qkv), 1 (out), 2 (up) or 3 (down)");
        ok = 0;
    }
    if (ok) {
        Layer *l = &m->layer[number];
        Linear *linear = (Linear *[]){&l->qkv, &l->out, &l->up, &l->down}[which];
        int in = which == 3 ? m->inner : m->hidden;
        int out = which == 0 ? 3 * m->hidden : which == 2 ? m->inner : m->hidden;
        ok = holds(&w, (size_t)in * out, 1, "weight") && holds(&scale, out, 4, "scale") &&
             holds(&bias, out, 4, "bias");
        Linear packed = {0}; /* a weight that is refused leaves the one before */
        if (ok && pack(&packed, in, out, w.buf, scale.buf, bias.buf)) {
            free_linear(&packed);
            PyErr_NoMemory();
            ok = 0;
        }
        if (ok) {
            free_linear(linear);
            *linear = packed;
        }
    }
    PyBuffer_Release(&w);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&bias);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* set_norm(model, layer, which, scale, shift, epsilon); layer 0: the embeddings' norm */
static PyObject *py_set_norm(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, which;
    float epsilon;
    Py_buffer scale, shift;
    if (!PyArg_ParseTuple(args, "Oiiy*y*f", &capsule, &number, &which, &scale, &shift, &epsilon)) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m, number, 0) && holds(&scale, m->hidden, 4, "scale") &&
             holds(&shift, m->hidden, 4, "shift");
    if (ok) {
        Layer *l = &m->layer[number];
        Norm *norm = number == 0 ? &m->norm : which == 0 ? &l->after_attention : &l->after_ffn;
        free_norm(norm);
        *norm = (Norm){copy_of(scale.buf, scale.len), copy_of(shift.buf, shift.len), epsilon};
        if (!norm->scale || !norm->shift) {
            PyErr_NoMemory();
            ok = 0;
        }
    }
    PyBuffer_Release(&scale);
    PyBuffer_Release(&shift);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* set_embeddings(model, words (V, H) int8, scale (V), positions (P, H), types (T, H) or empty) */
static PyObject *py_set_embeddings(PyObject *self, PyObject *args) {
    PyObject *capsule;
    Py_buffer word, scale, position, type;
    if (!PyArg_ParseTuple(args, "Oy*y*y*y*", &capsule, &word, &scale, &position, &type)) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL;
    if (ok) {
        size_t words = scale.len / 4, positions = position.len / 4 / m->hidden, types = type.len / 4 / m->hidden;
        ok = holds(&word, words * m->hidden, 1, "words") &&
             holds(&position, positions * m->hidden, 4, "positions") &&
             holds(&type, types * m->hidden, 4, "types");
        if (ok && (m->word || words > 1 << 30 || positions > 1 << 30)) {
            PyErr_SetString(PyExc_ValueError, "the embeddings are set already, or too large");
            ok = 0;
        }
        m->words = ok ? (int)words : m->words;
        m->positions = ok ? (int)positions : m->positions;
        m->types = ok ? (int)types : m->types;
    }
    if (ok) {
        free(m->word);
        free(m->word_scale);
        free(m->position);
        free(m->type);
        m->word = copy_of(word.buf, word.len);
        m->word_scale = copy_of(scale.buf, scale.len);
        m->position = copy_of(position.buf, position.len);
        m->type = copy_of(type.buf, type.len);
        if (!m->word || !m->word_scale || !m->position || !m->type) {
            PyErr_NoMemory();
            ok = 0;
        }
    }
    PyBuffer_Release(&word);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&position);
    PyBuffer_Release(&type);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* set_exit(model, layer, classifier (K, H), bias (K), weight (H, D) int8, scale (D), bias (D)); the last three
 * are empty for an exit without prototypes */
static PyObject *py_set_exit(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number;
    Py_buffer classifier, bias, w, scale, shift;
    if (!PyArg_ParseTuple(args, "Oiy*y*y*y*y*", &capsule, &number, &classifier, &bias, &w, &scale, &shift))
        return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m, number, 0);
    if (ok) {
        Exit *leave = &m->exit[number];
        int labels = (int)(bias.len / 4), metric = (int)(scale.len / 4);
        ok = holds(&classifier, (size_t)labels * m->hidden, 4, "classifier") &&
             holds(&w, (size_t)metric * m->hidden, 1, "weight") && holds(&shift, metric, 4, "bias");
        for (int i = 0; ok && i <= m->layers; i++)
            ok = labels >= 2 && (!m->exit[i].is_set || m->exit[i].labels == labels);
        if (!ok && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "exits must have the same labels, 2 or more");
        if (ok && metric % 32) {
            PyErr_SetString(PyExc_ValueError, "a metric space must have a multiple of 32 dimensions");
            ok = 0;
        }
        if (ok && leave->is_set) {
            PyErr_SetString(PyExc_ValueError, "this exit is set already");
            ok = 0;
        }
        if (ok) {
            *leave = (Exit){.is_set = 1, .labels = labels, .metric = metric};
            leave->classifier = copy_of(classifier.buf, classifier.len);
            leave->bias = copy_of(bias.buf, bias.len);
            if (!leave->classifier || !leave->bias ||
                (metric && pack(&leave->space, m->hidden, metric, w.buf, scale.buf, shift.buf))) {
                PyErr_NoMemory();
                ok = 0;
            }
        }
    }
    PyBuffer_Release(&classifier);
    PyBuffer_Release(&bias);
    PyBuffer_Release(&w);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&shift);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

static int is_whole(const Model *m, int number) {
    const Layer *l = &m->layer[number];
    const void *parts[] = {l->qkv.sums, l->out.sums, l->up.sums, l->down.sums, l->after_attention.shift,
                           l->after_ffn.shift};
    if (number == 0) return m->word != NULL && m->norm.shift != NULL;
    for (int i = 0; i < 6; i++)
        if (parts[i] == NULL) return 0;
    return 1;
}

/* run(model, layer, from, types, to, prototypes, logits, distances): one layer and, if logits is given, its
 * exit. from: ids int64 (T) for layer 0, else hidden states (T, H). types: int64 (T) for layer 0 of a model that
 * has them. to: hidden states (T, H). All but from and to may be None. Without the GIL while it computes. */
static PyObject *py_run(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, failed = 0;
    Py_buffer from, to, types = {0}, prototypes = {0}, logits = {0}, distances = {0};
    if (!PyArg_ParseTuple(args, "Oiy*z*w*z*z*z*", &capsule, &number, &from, &types, &to, &prototypes, &logits,
                          &distances))
        return NULL;
    const Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m, number, 0);
    size_t tokens = 0;
    if (ok) {
        const Exit *leave = &m->exit[number];
        tokens = (size_t)to.len / 4 / m->hidden;
        ok = holds(&to, tokens * m->hidden, 4, "to") &&
             (number ? holds(&from, tokens * m->hidden, 4, "from") : holds(&from, tokens, 8, "ids"));
        if (ok && number == 0 && m->types) ok = holds(&types, tokens, 8, "types");
        if (ok && (tokens < 1 || tokens > 1 << 16 || !is_whole(m, number))) {
            PyErr_SetString(PyExc_ValueError, "no tokens, too many, or a layer that is not whole");
            ok = 0;
        }
        if (ok && logits.buf) {
            size_t k = (size_t)leave->labels;
            if (!leave->is_set) PyErr_SetString(PyExc_ValueError, "this layer has no exit");
            ok = leave->is_set && !logits.readonly && holds(&logits, k, 4, "logits");
            if (ok && !leave->metric && distances.buf) {
                PyErr_SetString(PyExc_ValueError, "this layer has no metric space, so no distances");
                ok = 0;
            }
            if (ok && leave->metric)
                ok = prototypes.buf && distances.buf && !distances.readonly &&
                     holds(&distances, k, 4, "distances") &&
                     holds(&prototypes, k * leave->metric, 4, "prototypes");
            if (!ok && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "an exit's arrays are missing");
        }
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        failed = number ? run_layer(m, number, from.buf, (int)tokens, to.buf)
                        : run_embeddings(m, from.buf, types.buf, (int)tokens, to.buf);
        if (!failed && logits.buf)
            failed = run_exit(m, number, to.buf, (int)tokens, prototypes.buf, logits.buf, distances.buf);
        Py_END_ALLOW_THREADS;
        if (failed) PyErr_SetString(PyExc_ValueError, "an id outside the tables, or no memory");
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&types);
    PyBuffer_Release(&to);
    PyBuffer_Release(&prototypes);
    PyBuffer_Release(&logits);
    PyBuffer_Release(&distances);
    if (!ok || failed) return NULL;
    Py_RETURN_NONE;
}

/* leaves(logits, distances or None, tau, lam): the decision, for the tests. */
static PyObject *py_leaves(PyObject *self, PyObject *args) {
    Py_buffer logits, distances = {0};
    double tau, lam;
    if (!PyArg_ParseTuple(args, "y*z*dd", &logits, &distances, &tau, &lam)) return NULL;
    int labels = (int)(logits.len / 4), ok = labels >= 2 && holds(&logits, labels, 4, "logits");
    if (ok && distances.buf) ok = holds(&distances, labels, 4, "distances");
    int yes = ok && leaves(logits.buf, distances.buf, labels, tau, lam);
    PyBuffer_Release(&logits);
    PyBuffer_Release(&distances);
    if (!ok && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "2 labels or more");
    return ok ? PyBool_FromLong(yes) : NULL;
}

/* through(model, texts, prototypes, far) → [(layer, seconds, is_far)]
 * texts: [(ids int64 (T), types int64 (T) or None, tau, lam, deepest, every, caution, logits, distances)], the
 * last two float32 (layers + 1, labels), filled at the exits that were passed. prototypes: [(labels, metric)
 * float32 or None], index = layer. far: float64 (layers + 1) or None: a text whose nearest prototype is further
 * than that at an exit goes on with caution·tau. Without the GIL while it computes. */
static PyObject *py_through(PyObject *self, PyObject *args) {
    enum { MOST = 64 };
    PyObject *capsule, *list, *rows, *result = NULL;
    Py_buffer far = {0};
    if (!PyArg_ParseTuple(args, "OO!O!z*", &capsule, &PyList_Type, &list, &PyList_Type, &rows, &far)) return NULL;
    const Model *m = model_of(capsule);
    if (m == NULL || (far.buf && !holds(&far, m->layers + 1, 8, "far"))) {
        PyBuffer_Release(&far);
        return NULL;
    }
    int count = (int)PyList_GET_SIZE(list), opened = 0, prepared = 0, failed = 0;
    if (count < 1 || count > MOST || PyList_GET_SIZE(rows) != m->layers + 1) {
        PyErr_Format(PyExc_ValueError, "1 to %d texts, and prototypes for every layer", MOST);
        PyBuffer_Release(&far);
        return NULL;
    }
    Text texts[MOST];
    Py_buffer buffers[MOST][4], spaces[MAX_LAYERS + 1];
    const float *prototypes[MAX_LAYERS + 1];
    memset(texts, 0, sizeof(Text) * count);
    memset(buffers, 0, sizeof buffers[0] * count);
    for (; opened <= m->layers; opened++) {
        const Exit *leave = &m->exit[opened];
        memset(&spaces[opened], 0, sizeof(Py_buffer));
        if (leave->metric) {
            if (PyObject_GetBuffer(PyList_GET_ITEM(rows, opened), &spaces[opened], PyBUF_SIMPLE)) goto done;
            if (!holds(&spaces[opened], (size_t)leave->labels * leave->metric, 4, "prototypes")) {
                opened++;
                goto done;
            }
        }
        prototypes[opened] = spaces[opened].buf;
        if (!is_whole(m, opened)) {
            PyErr_SetString(PyExc_ValueError, "a layer is not whole");
            opened++;
            goto done;
        }
    }
    for (; prepared < count; prepared++) {
        Text *t = &texts[prepared];
        Py_buffer *b = buffers[prepared];
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, prepared), "y*z*ddipdw*w*", &b[0], &b[1], &t->tau, &t->lam,
                              &t->deepest, &t->every, &t->caution, &b[2], &b[3]))
            goto done;
        size_t labels = (size_t)m->exit[m->layers].labels, every = labels * (m->layers + 1);
        t->ids = b[0].buf;
        t->types = b[1].buf;
        t->tokens = (int)(b[0].len / 8);
        t->layer = -1;
        t->logits = b[2].buf;
        t->distances = b[3].buf;
        t->hidden = aligned_alloc(64, ROUND_UP((size_t)t->tokens * m->hidden * 4 + 64, 64));
        int ok = in_range(m, t->deepest, 0) && holds(&b[2], every, 4, "logits") &&
                 holds(&b[3], every, 4, "distances") && holds(&b[0], t->tokens, 8, "ids") &&
                 (!m->types || holds(&b[1], t->tokens, 8, "types"));
        if (ok && (t->hidden == NULL || t->tokens < 1 || t->tokens > 1 << 16 || !m->exit[t->deepest].is_set ||
                   !m->exit[m->layers].is_set)) {
            PyErr_SetString(PyExc_ValueError, "no tokens, too many, no memory, or no exit at the deepest layer");
            ok = 0;
        }
        if (!ok) {
            prepared++;
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS;
    failed = run_through(m, texts, count, prototypes, far.buf);
    Py_END_ALLOW_THREADS;
    if (failed) {
        PyErr_SetString(PyExc_ValueError, "an id outside the tables, or no memory");
        goto done;
    }
    result = PyList_New(count);
    for (int i = 0; result != NULL && i < count; i++) {
        PyObject *pair = Py_BuildValue("idi", texts[i].layer, texts[i].seconds, texts[i].is_far);
        if (pair == NULL) Py_CLEAR(result);
        else PyList_SET_ITEM(result, i, pair);
    }
done:
    for (int i = 0; i < prepared; i++) {
        free(texts[i].hidden);
        for (int j = 0; j < 4; j++) PyBuffer_Release(&buffers[i][j]);
    }
    for (int i = 0; i < opened; i++) PyBuffer_Release(&spaces[i]);
    PyBuffer_Release(&far);
    return result;
}
#endif

static PyMethodDef methods[] = {
    {"why_not", py_why_not, METH_NOARGS, "Why there are no kernels here; empty where there are."},
    {"supported", py_supported, METH_NOARGS, "What this machine has for the kernels: amx, vnni or nothing."},
#ifdef HAVE_KERNELS
    {"new", py_new, METH_VARARGS, "new(hidden, heads, inner, layers, gelu, mean)"},
    {"set_linear", py_set_linear, METH_VARARGS, "set_linear(model, layer, which, weight, scale, bias)"},
    {"set_norm", py_set_norm, METH_VARARGS, "set_norm(model, layer, which, scale, shift, epsilon)"},
    {"set_embeddings", py_set_embeddings, METH_VARARGS, "set_embeddings(model, words, scale, positions, types)"},
    {"set_exit", py_set_exit, METH_VARARGS, "set_exit(model, layer, classifier, bias, weight, scale, shift)"},
    {"use", py_use, METH_VARARGS, "use(name): amx or vnni"},
    {"peak", py_peak, METH_NOARGS, "int8 multiply-adds per second of one core at its best"},
    {"leaves", py_leaves, METH_VARARGS, "leaves(logits, distances, tau, lam)"},
    {"through", py_through, METH_VARARGS, "through(model, texts, prototypes, far)"},
    {"run", py_run, METH_VARARGS, "run(model, layer, from, types, to, prototypes, logits, distances)"},
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_kernels(void) { return PyModule_Create(&definition); }
