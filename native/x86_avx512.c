/* AMX and AVX-512 VNNI, for Linux on x86-64.
 *
 * Both share everything but the int8 product. Sums of int8 products are exact, so AMX and VNNI give the same bits.
 */
#include "kernels.h"

#if !defined(__x86_64__) || !defined(__linux__)
static const char *why_not(void) { return "needs Linux on x86-64"; }
const Kernels amx_kernels = {.name = "amx", .why_not = why_not};
const Kernels vnni_kernels = {.name = "vnni", .why_not = why_not};
#elif (defined(__clang__) && __clang_major__ < 12) || (!defined(__clang__) && __GNUC__ < 11)
#warning "This compiler does not know AMX: no kernels for x86-64, ONNX Runtime runs every model, 1.5 times slower."
static const char *why_not(void) { return "needs a build with gcc 11, clang 12 or newer"; }
const Kernels amx_kernels = {.name = "amx", .why_not = why_not};
const Kernels vnni_kernels = {.name = "vnni", .why_not = why_not};
#else
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *vnni_why_not(void) {
    static const char *const missing = "needs AVX-512 VNNI";
    unsigned a, b, c, d, features, low, high;
    if (!__get_cpuid(1, &a, &b, &features, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return missing;
    const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31); /* F, DQ, BW, VL */
    if ((b & avx512) != avx512 || !(c & (1u << 11)) || !(features & (1u << 27))) return missing; /* VNNI, OSXSAVE */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 0xe6) == 0xe6 ? NULL : "the system does not save AVX-512 registers";
}

static const char *amx_why_not(void) {
    unsigned a, b, c, d = 0;
    const char *missing = vnni_why_not();
    if (missing != NULL) return missing;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (!(d & (1u << 24)) || !(d & (1u << 25))) return "needs AMX";
    /* Linux gives tile registers to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? NULL : "the system gives no AMX registers";
}

/* The functions up to the matching pop use these instructions: call them only if why_not() says NULL. */
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8")
#endif

/* min and max give their second operand if one is NaN: here NaN stays. */
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
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

/* NaN counts only if there is nothing else. */
static Range range(const float *x, size_t count) {
    __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
    for (size_t i = 0; i < count; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        low = _mm512_min_ps(v, low);
        high = _mm512_max_ps(v, high);
    }
    Range found = {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
    return found.low > found.high ? (Range){NAN, NAN} : found;
}

static void quantize(const float *x, int tokens, int width, const Quantization *shared, Quantization *rows,
                     uint8_t *to) {
    __m512i zeros = _mm512_set1_epi32(MIDDLE);
    __m512 least = _mm512_set1_ps(-(float)MIDDLE), most = _mm512_set1_ps(255.0f - MIDDLE);
    for (int t = 0; t < tokens; t++, x += width, to += width) {
        rows[t] = shared ? *shared : quantization_of(range(x, width));
        __m512 inverse = _mm512_set1_ps(1.0f / rows[t].scale), center = _mm512_set1_ps(rows[t].center);
        for (int i = 0; i < width; i += 16) {
            __m512 steps = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), center), inverse);
            steps = _mm512_min_ps(_mm512_max_ps(steps, least), most); /* NaN: the least */
            __m512i v = _mm512_add_epi32(_mm512_cvtps_epi32(steps), zeros);
            _mm_storeu_si128((__m128i *)(to + i), _mm512_cvtepi32_epi8(v));
        }
    }
}

/* What follows a product: scale, bias, and GELU, ReLU or the residual; for `rows` rows and 16 outputs of a tile. */
static inline __attribute__((always_inline)) void finish(const Product *p, const int32_t *tile, int row,
                                                         int column, int rows, Then then) {
    const Linear *w = p->w;
    __m512 scale = _mm512_loadu_ps(w->scale + column), bias = _mm512_loadu_ps(w->bias + column);
    __m512 center = _mm512_loadu_ps(w->center + column);
    __m512i middle = _mm512_loadu_si512(w->middle + column);
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(row + r) * w->out + column;
        const Quantization *q = &p->rows[row + r];
        __m512i sum = _mm512_sub_epi32(_mm512_load_si512(tile + 16 * r), middle);
        __m512 shift = _mm512_fmadd_ps(_mm512_set1_ps(q->center), center, bias);
        __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(q->scale)), shift);
        if (then == GELU) v = gelu16(v);
        if (then == RELU) v = _mm512_max_ps(v, _mm512_setzero_ps());
        if (then == RESIDUAL) v = _mm512_add_ps(v, _mm512_loadu_ps(p->residual + at));
        _mm512_storeu_ps(p->to + at, v);
    }
}

static void finish_tile(const Product *p, const int32_t *tile, int row, int column, int rows) {
    switch (p->then) {
    case PLAIN: finish(p, tile, row, column, rows, PLAIN); break;
    case GELU: finish(p, tile, row, column, rows, GELU); break;
    case RELU: finish(p, tile, row, column, rows, RELU); break;
    default: finish(p, tile, row, column, rows, RESIDUAL);
    }
}

/* VNNI: a block of rows by 32 outputs, 4 inputs at a time, from the same tiles. With 12 rows, 24 sums, two
 * weights and an input fill the registers; each number of rows has a loop of its own, so that no row is wasted.
 *
 * Few rows take less time than their weights take from memory, so what comes AHEAD bytes later is prefetched, from
 * `ahead` on, `step` bytes for each input: each block of rows fetches its share of a strip of 32 outputs. */
#ifndef AHEAD
#define AHEAD (1 << 17)
#endif
#ifndef HINT
#define HINT _MM_HINT_T1
#endif
enum { VNNI_ROWS = 12 };

static inline __attribute__((always_inline)) void multiply(const uint8_t *x, const Linear *w, int column,
                                                           const int8_t *ahead, int step, int32_t (*tile)[256],
                                                           int rows) {
    const int8_t *left = w->tiles + (size_t)column * w->in, *right = left + (size_t)w->in * 16;
    __m512i sum[VNNI_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int k = 0; k < w->in; k += 4) {
        __m512i l = _mm512_load_si512(left + (size_t)k * 16), h = _mm512_load_si512(right + (size_t)k * 16);
        _mm_prefetch(ahead + (size_t)k * step, HINT);
        if (step > 16) _mm_prefetch(ahead + (size_t)k * step + 64, HINT);
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

static void product_vnni(const Product *p) {
    const Linear *w = p->w;
    int32_t tile[2][256] __attribute__((aligned(64)));
    int blocks = (p->tokens + VNNI_ROWS - 1) / VNNI_ROWS;
    for (int column = 0; column < w->out; column += 32) {
        const int8_t *strip = w->tiles + (size_t)column * w->in;
        const int8_t *ahead = w->end - strip > AHEAD ? strip + AHEAD : strip;
        for (int block = 0; block < blocks; block++) {
            const int8_t *part = ahead + (size_t)block * w->in * 32 / blocks;
            int row = p->tokens * block / blocks, rows = p->tokens * (block + 1) / blocks - row;
            const uint8_t *from = p->x + (size_t)row * w->in;
            switch (rows) {
#define CASE(n) case n: multiply(from, w, column, part, 32 / blocks, tile, n); break
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
                CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#undef CASE
            }
            finish_tile(p, tile[0], row, column, rows);
            finish_tile(p, tile[1], row, column + 16, rows);
        }
    }
}

/* ---- AMX ---------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16]; /* bytes */
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

static void configure_tiles(void) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.columns[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

static void release_tiles(void) { _tile_release(); }

static void product_amx(const Product *p) {
    const Linear *w = p->w;
    int blocks = w->in / 64;
    int32_t tile[4][256] __attribute__((aligned(64)));
    for (int column = 0; column < w->out; column += 32) {
        const int8_t *left = w->tiles + (size_t)(column / 16) * blocks * 1024, *right = left + blocks * 1024;
        for (int row = 0; row < p->tokens; row += 32) {
            const uint8_t *upper = p->x + (size_t)row * w->in;
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
enum { ROWS = ATTENTION_ROWS };

/* scores[r][j] = factor · q[r]·k[j] + added[r][j] for 16·vectors keys from keys (width, wide) on. added NULL: nothing. */
static inline __attribute__((always_inline)) void score(const float *const *q, const float *keys, int width, int wide,
                                                        __m512 factor, int vectors, const float *const *added, int j,
                                                        float *scores) {
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
        for (int c = 0; c < vectors; c++) {
            __m512 v = _mm512_mul_ps(s[r][c], factor);
            if (added[r]) v = _mm512_add_ps(v, _mm512_loadu_ps(added[r] + j + 16 * c));
            _mm512_storeu_ps(scores + (size_t)r * wide + 16 * c, v);
        }
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

static void attention(const float *qkv, int tokens, int hidden, int num_heads, const Offsets *offsets, float *work,
                      float *to) {
    int width = hidden / num_heads, wide = ROUND_UP(tokens, 16), stride = 3 * hidden;
    float *keys = work, *scores = work + (size_t)width * wide; /* (width, wide), (ROWS, wide) */
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf((float)width)), least = _mm512_set1_ps(-INFINITY);
    __mmask16 last = (__mmask16)(0xFFFFu >> (wide - tokens));
    for (int h = 0; h < num_heads; h++) {
        const float *q = qkv + h * width, *k = q + hidden, *v = k + hidden;
        transpose(k, stride, tokens, width, wide, keys);
        for (int t = 0; t < tokens; t += ROWS) {
            int rows = tokens - t < ROWS ? tokens - t : ROWS;
            const float *row[ROWS], *added[ROWS]; /* past the end: the last row once more */
            __m512 inverse[ROWS];
            for (int r = 0; r < ROWS; r++) {
                int token = r < rows ? t + r : tokens - 1;
                row[r] = q + (size_t)token * stride;
                added[r] = offsets_of(offsets, h, token);
            }
            int j = 0;
            for (; j + 32 <= wide; j += 32) score(row, keys + j, width, wide, factor, 2, added, j, scores + j);
            if (j < wide) score(row, keys + j, width, wide, factor, 1, added, j, scores + j);
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

/* ---- the rest --------------------------------------------------------------------------------------- */

static void embed(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 16) {
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(word + i))));
        v = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(scale)), _mm512_loadu_ps(position + i));
        if (type) v = _mm512_add_ps(v, _mm512_loadu_ps(type + i));
        _mm512_storeu_ps(to + i, v);
    }
}

static void mean(const float *rows, int tokens, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int t = 0; t < tokens; t++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(rows + (size_t)t * hidden + i));
        _mm512_storeu_ps(to + i, _mm512_div_ps(sum, _mm512_set1_ps((float)tokens)));
    }
}

static float dot(const float *a, const float *b, int count) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

/* 4·16 multiply-adds by 16 sums that do not wait for each other. */
static double multiply_adds_vnni(void) {
    enum { TIMES = 4000 };
    __m512i sum[16], x = _mm512_set1_epi8(1);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
    for (int n = 0; n < TIMES; n++) {
        for (int i = 0; i < 16; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
        __asm__ volatile("" : "+v"(x)); /* so that it is not computed once for all */
    }
    for (int i = 0; i < 16; i++) __asm__ volatile("" : : "v"(sum[i]));
    return TIMES * 16 * 64.0;
}

static double multiply_adds_amx(void) {
    enum { TIMES = 1000 };
    for (int n = 0; n < TIMES; n++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    return TIMES * 4 * 16384.0;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SHARED                                                                                                \
    .range = range, .quantize = quantize, .attention = attention, .layer_norm = layer_norm, .embed = embed,   \
    .mean = mean, .dot = dot

const Kernels amx_kernels = {
    .name = "amx",
    .why_not = amx_why_not,
    .begin = configure_tiles,
    .end = release_tiles,
    .product = product_amx,
    .multiply_adds = multiply_adds_amx,
    SHARED,
};

const Kernels vnni_kernels = {
    .name = "vnni",
    .why_not = vnni_why_not,
    .product = product_vnni,
    .multiply_adds = multiply_adds_vnni,
    SHARED,
};
#endif
