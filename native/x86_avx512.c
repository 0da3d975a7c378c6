/* AMX and AVX-512 VNNI, for Linux on x86-64.
 *
 * Both share everything but the products. Sums of int8 products are exact, so both give the same bits; products in
 * bfloat16, in the attention of long texts, differ by rounding.
 */
#include "kernels.h"

#if !defined(__x86_64__) || !defined(__linux__)
static const char *why_not(void) { return "needs Linux on x86-64"; }
const Kernels amx_kernels = {.name = "amx", .why_not = why_not};
const Kernels vnni_kernels = {.name = "vnni", .why_not = why_not};
#elif (defined(__clang__) && __clang_major__ < 12) || (!defined(__clang__) && __GNUC__ < 11)
#warning "This compiler does not support AMX: no AVX-512 kernels; the other kernels and ONNX Runtime are slower."
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

static int has_bfloat16(void) {
    static int found = -1;
    unsigned a = 0, b, c, d;
    if (found < 0) found = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 5);
    return found;
}

static const char *amx_why_not(void) {
    unsigned a, b, c, d = 0;
    const char *missing = vnni_why_not();
    if (missing != NULL) return missing;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    const unsigned all = (1u << 22) | (1u << 24) | (1u << 25); /* BF16, TILE, INT8 */
    if ((d & all) != all || !has_bfloat16()) return "needs AMX";
    /* Linux grants tile registers to a process on request: ARCH_REQ_XCOMP_PERM, XTILEDATA. */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? NULL : "the system grants no AMX registers";
}

/* Code up to the matching pop uses these instructions; call it only if why_not() returns NULL. */
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,amx-tile,amx-int8,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,amx-tile,amx-int8,amx-bf16")
#endif

/* eˣ for x ≤ 0. min and max return their second operand if either is NaN, so NaN stays NaN. */
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

static void layer_norm(const float *from, int tokens, int hidden, const Norm *norm, float *to) {
    for (int t = 0; t < tokens; t++) {
        const float *x = from + (size_t)t * hidden;
        float *y = to + (size_t)t * hidden;
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
            _mm512_storeu_ps(y + i, _mm512_fmadd_ps(d, _mm512_loadu_ps(norm->scale + i),
                                                    _mm512_loadu_ps(norm->shift + i)));
        }
    }
}

/* ---- int8 ------------------------------------------------------------------------------------------- */

/* NaN is ignored unless all values are NaN. */
static Range range(const float *x, size_t count) {
    __m512 low[4], high[4]; /* independent chains */
    for (int c = 0; c < 4; c++) {
        low[c] = _mm512_set1_ps(INFINITY);
        high[c] = _mm512_set1_ps(-INFINITY);
    }
    for (size_t i = 0; i < count; i += 64)
        for (int c = 0; c < 4; c++) {
            __m512 v = _mm512_loadu_ps(x + i + 16 * c);
            low[c] = _mm512_min_ps(v, low[c]);
            high[c] = _mm512_max_ps(v, high[c]);
        }
    low[0] = _mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3]));
    high[0] = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
    Range found = {_mm512_reduce_min_ps(low[0]), _mm512_reduce_max_ps(high[0])};
    return found.low > found.high ? (Range){NAN, NAN} : found;
}

static void quantize(const float *x, int tokens, int width, Quantization *rows, uint8_t *to) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i middle = _mm512_set1_epi8((char)MIDDLE); /* int8 to uint8 */
    __m512 least = _mm512_set1_ps(-1e6f), most = _mm512_set1_ps(1e6f); /* within int32; packing saturates */
    for (int t = 0; t < tokens; t++, x += width, to += width) {
        rows[t] = quantization_of(range(x, width));
        __m512 inverse = _mm512_set1_ps(1.0f / rows[t].scale), center = _mm512_set1_ps(rows[t].center);
        for (int i = 0; i < width; i += 64) {
            __m512i v[4];
            for (int c = 0; c < 4; c++) {
                __m512 steps = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i + 16 * c), center), inverse);
                steps = _mm512_min_ps(_mm512_max_ps(steps, least), most); /* NaN becomes least */
                v[c] = _mm512_cvtps_epi32(steps);
            }
            __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
            bytes = _mm512_permutexvar_epi32(order, _mm512_xor_si512(bytes, middle));
            _mm512_storeu_si512(to + i, bytes);
        }
    }
}

/* Dequantize sums and apply the epilogue, for `rows` rows and 16 outputs of a tile. */
static inline __attribute__((always_inline)) void finish(const Product *p, const int32_t *tile, int row,
                                                         int column, int rows, Epilogue epilogue) {
    const Linear *w = p->w;
    __m512 scale = _mm512_loadu_ps(w->scale + column), bias = _mm512_loadu_ps(w->bias + column);
    __m512 center = _mm512_loadu_ps(w->center + column);
    __m512i offset = _mm512_loadu_si512(w->offset + column);
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(row + r) * w->out + column;
        const Quantization *q = &p->rows[row + r];
        __m512i sum = _mm512_sub_epi32(_mm512_load_si512(tile + 16 * r), offset);
        __m512 shift = _mm512_fmadd_ps(_mm512_set1_ps(q->center), center, bias);
        __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(q->scale)), shift);
        if (epilogue == GELU) v = gelu16(v);
        if (epilogue == RELU) v = _mm512_max_ps(v, _mm512_setzero_ps());
        if (epilogue == RESIDUAL) v = _mm512_add_ps(v, _mm512_loadu_ps(p->other + at));
        if (epilogue == GATE) v = _mm512_mul_ps(v, _mm512_loadu_ps(p->other + at));
        _mm512_storeu_ps(p->to + at, v);
    }
}

static void finish_tile(const Product *p, const int32_t *tile, int row, int column, int rows) {
    switch (p->epilogue) {
    case PLAIN: finish(p, tile, row, column, rows, PLAIN); break;
    case GELU: finish(p, tile, row, column, rows, GELU); break;
    case RELU: finish(p, tile, row, column, rows, RELU); break;
    case GATE: finish(p, tile, row, column, rows, GATE); break;
    default: finish(p, tile, row, column, rows, RESIDUAL);
    }
}

/* VNNI: a block of rows by 32 outputs, 4 inputs at a time, from the tiles that AMX uses. With 12 rows, 24 sums, two
 * weights and an input take 27 of 32 registers; each number of rows has its own loop, so that no row is wasted.
 *
 * With few rows, reading the weights from memory takes longer than multiplying, so the weights AHEAD bytes later are
 * prefetched, from `ahead` on, `step` bytes for each input: each block of rows prefetches its share of a strip of 32
 * outputs. */
enum { VNNI_ROWS = 12, AHEAD = 1 << 17 };

static inline __attribute__((always_inline)) void multiply(const uint8_t *x, const Linear *w, int column,
                                                           const int8_t *ahead, int step, int32_t (*tile)[256],
                                                           int rows) {
    const int8_t *left = w->tiles + (size_t)column * w->in, *right = left + (size_t)w->in * 16;
    __m512i sum[VNNI_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int k = 0; k < w->in; k += 4) {
        __m512i l = _mm512_load_si512(left + (size_t)k * 16), h = _mm512_load_si512(right + (size_t)k * 16);
        _mm_prefetch(ahead + (size_t)k * step, _MM_HINT_T1);
        if (step > 16) _mm_prefetch(ahead + (size_t)k * step + 64, _MM_HINT_T1);
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

/* 16 · `vectors` columns of a·b, for `rows` rows of a; b has `stride` columns. The loops have constant bounds, so that
 * the sums stay in registers. With pairs, each value holds two bfloat16 numbers; their products are added. */
static inline __attribute__((always_inline)) void accumulate(const float *const *a, const float *b, size_t stride,
                                                             int count, int pairs, int rows, int vectors,
                                                             __m512 (*sum)[2]) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) sum[r][c] = _mm512_setzero_ps();
    for (int i = 0; i < count; i++) {
        __m512 column[2];
        for (int c = 0; c < vectors; c++) column[c] = _mm512_loadu_ps(b + i * stride + 16 * c);
        for (int r = 0; r < rows; r++) {
            __m512 x = _mm512_set1_ps(a[r][i]);
            for (int c = 0; c < vectors; c++)
                sum[r][c] = pairs ? _mm512_dpbf16_ps(sum[r][c], (__m512bh)x, (__m512bh)column[c])
                                  : _mm512_fmadd_ps(x, column[c], sum[r][c]);
        }
    }
}

/* The scores of 16 · `vectors` keys, from key j of the block on. q: the queries, as pairs if the tile has pairs. */
static inline __attribute__((always_inline)) void score_keys(const Block *b, const float *const *q, const float *keys,
                                                             size_t wide, int j, int rows, int vectors) {
    int pairs = b->tile->pairs;
    __m512 sum[ATTENTION_ROWS][2], factor = _mm512_set1_ps(b->factor);
    accumulate(q, keys + j, wide, b->tile->width >> pairs, pairs, rows, vectors, sum);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            __m512 v = _mm512_mul_ps(sum[r][c], factor);
            if (b->added[r]) v = _mm512_add_ps(v, _mm512_loadu_ps(b->added[r] + j + 16 * c));
            _mm512_storeu_ps(b->scores + r * b->score_stride + j + 16 * c, v);
        }
}

/* To bfloat16 and back, on processors without instructions for it; see bfloat16_of. */
static inline __m512 round_bits16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000)));
}

static inline __m512 round16(__m512 x) { /* to bfloat16 and back */
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}

/* Two vectors as one vector of bfloat16 pairs, in order. */
static inline __m512 to_pairs(__m512 first, __m512 second) { return (__m512)_mm512_cvtne2ps_pbh(second, first); }

/* A mask of the keys i … i + 15: true for those from low to high − 1. */
static inline __mmask16 seen(int i, int low, int high) {
    unsigned mask = 0xffff;
    if (i + 16 > high) mask = i < high ? mask >> (i + 16 - high) : 0;
    if (i < low) mask = low < i + 16 ? mask & mask << (low - i) : 0;
    return (__mmask16)mask;
}

static inline __m512 weights_of(const float *scores, __m512 max, int i, int low, int high) {
    __m512 weights = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + i), max));
    return i < low || i + 16 > high ? _mm512_maskz_mov_ps(seen(i, low, high), weights) : weights;
}

/* Turn a query's scores (wide) into weights, which are 0 outside its keys; returns the sum of the weights. largest: the
 * largest score so far, updated. */
static float soften(const Block *b, int r, int wide, float *largest) {
    float *s = b->scores + r * b->score_stride;
    int low = b->low[r], high = b->high[r];
    __m512 max = _mm512_set1_ps(*largest), total = _mm512_setzero_ps();
    for (int i = 0; i < wide; i += 16) {
        __m512 v = _mm512_loadu_ps(s + i);
        if (i < low || i + 16 > high) v = _mm512_mask_mov_ps(max, seen(i, low, high), v);
        max = _mm512_max_ps(max, v);
    }
    *largest = _mm512_reduce_max_ps(max);
    max = _mm512_set1_ps(*largest);
    if (b->tile->pairs) {
        __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        for (int i = 0; i < wide; i += 32) {
            __m512 second = i + 16 < wide ? weights_of(s, max, i + 16, low, high) : _mm512_setzero_ps();
            __m512 both = to_pairs(weights_of(s, max, i, low, high), second);
            total = _mm512_dpbf16_ps(total, (__m512bh)both, ones);
            _mm512_storeu_ps(s + i / 2, both);
        }
    } else
        for (int i = 0; i < wide; i += 16) {
            __m512 e = weights_of(s, max, i, low, high);
            if (b->tile->rounds) e = round_bits16(e);
            total = _mm512_add_ps(total, e);
            _mm512_storeu_ps(s + i, e);
        }
    return _mm512_reduce_add_ps(total);
}

/* 16 · `vectors` columns of the weighted mean of the values, from column d on. */
static inline __attribute__((always_inline)) void mix_values(const Block *b, const float *v, size_t stride,
                                                             const float *inverse, const float *carry, int d, int rows,
                                                             int vectors) {
    int pairs = b->tile->pairs;
    __m512 sum[ATTENTION_ROWS][2];
    const float *weights[ATTENTION_ROWS];
    for (int r = 0; r < rows; r++) weights[r] = b->scores + r * b->score_stride;
    accumulate(weights, v + d, stride, (b->last - b->first + pairs) >> pairs, pairs, rows, vectors, sum);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            float *to = b->to[r] + d + 16 * c;
            __m512 mixed = _mm512_mul_ps(sum[r][c], _mm512_set1_ps(inverse[r]));
            if (b->largest) mixed = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(carry[r]), mixed);
            _mm512_storeu_ps(to, mixed);
        }
}

/* Transpose 16 by 16 in place. */
static inline void transpose16(__m512 *x) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            __m512d a = (__m512d)y[i + k], b = (__m512d)y[i + k + 2];
            x[i + 2 * k] = (__m512)_mm512_unpacklo_pd(a, b);
            x[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2; i++) {
            y[8 * i + k] = _mm512_shuffle_f32x4(x[8 * i + k], x[8 * i + k + 4], 0x88);
            y[8 * i + k + 4] = _mm512_shuffle_f32x4(x[8 * i + k], x[8 * i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        x[k] = _mm512_shuffle_f32x4(y[k], y[k + 8], 0x88);
        x[k + 8] = _mm512_shuffle_f32x4(y[k], y[k + 8], 0xdd);
    }
}

/* keys[d][t] = k[t][d] for a tile of a head, (width, wide), zeros past the end; with pairs of d, (width / 2, wide). */
static void transpose(const float *k, size_t stride, int tokens, int width, int wide, int pairs, float *keys) {
    for (int t = 0; t < wide; t += 16)
        for (int d = 0; d < width; d += 16 << pairs) {
            __m512 rows[16];
            for (int i = 0; i < 16; i++) {
                const float *from = k + (t + i) * stride + d;
                if (t + i >= tokens) rows[i] = _mm512_setzero_ps();
                else rows[i] = pairs ? to_pairs(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)) : _mm512_loadu_ps(from);
            }
            transpose16(rows);
            for (int i = 0; i < 16; i++) _mm512_storeu_ps(keys + ((d >> pairs) + i) * (size_t)wide + t, rows[i]);
        }
}

/* to[t / 2][d] = the pair of v[t][d] and v[t + 1][d]; at least 32 tokens of zeros past the end. */
static void pair_values(const float *v, size_t stride, int tokens, int width, float *to) {
    for (int t = 0; t < ROUND_UP(tokens, 16) + 32; t += 2)
        for (int d = 0; d < width; d += 16) {
            __m512 first = _mm512_setzero_ps(), second = first;
            if (t < tokens) first = round16(_mm512_loadu_ps(v + t * stride + d));
            if (t + 1 < tokens) second = round16(_mm512_loadu_ps(v + (t + 1) * stride + d));
            __m512i pair = _mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
            _mm512_storeu_si512(to + t / 2 * (size_t)width + d, pair);
        }
}

/* With pairs, `work` gets keys (width / 2, wide) and values (tokens / 2, width); otherwise it gets keys (width, wide),
 * and values stay where they are. */
static void prepare(const Tile *t) {
    int wide = ROUND_UP(t->tokens, 16);
    transpose(t->k, t->stride, t->tokens, t->width, wide, t->pairs, t->work);
    if (t->pairs && t->v) pair_values(t->v, t->stride, t->tokens, t->width, t->work + (size_t)t->width * wide);
}

static inline __attribute__((always_inline)) void score_rows(const Block *b, const float *const *q, int rows) {
    size_t wide = ROUND_UP(b->tile->tokens, 16);
    int count = ROUND_UP(b->last - b->first, 16), j = 0;
    const float *keys = b->tile->work + b->first;
    for (; j + 32 <= count; j += 32) score_keys(b, q, keys, wide, j, rows, 2);
    if (j < count) score_keys(b, q, keys, wide, j, rows, 1);
}

enum { MAX_PAIRED = 256 }; /* largest width with pairs */
typedef float Words[ATTENTION_ROWS][MAX_PAIRED / 2];

/* The queries as pairs. */
static void pair_queries(const Block *b, Words words) {
    for (int r = 0; r < b->rows; r++)
        for (int d = 0; d < b->tile->width; d += 32) {
            const float *q = b->q[r] + d;
            _mm512_storeu_ps(words[r] + d / 2, to_pairs(_mm512_loadu_ps(q), _mm512_loadu_ps(q + 16)));
        }
}

static void score(const Block *b) {
    Words words;
    const float *q[ATTENTION_ROWS];
    if (b->tile->pairs) pair_queries(b, words);
    for (int r = 0; r < b->rows; r++) q[r] = b->tile->pairs ? words[r] : b->q[r];
    switch (b->rows) {
#define CASE(n) case n: score_rows(b, q, n); break
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
#undef CASE
    }
}

/* Turn the scores of all rows into weights. inverse, carry: factors of the weighted values, and of the old `to`. */
static void soften_rows(const Block *b, float *inverse, float *carry) {
    for (int r = 0; r < b->rows; r++) {
        float largest = b->largest ? b->largest[r] : -INFINITY;
        float total = soften(b, r, ROUND_UP(b->last - b->first, 16), &largest);
        inverse[r] = b->largest ? 1.0f : 1.0f / total;
        carry[r] = b->largest ? carry_of(b->largest[r], largest) : 0.0f;
        if (b->largest) update(b, r, largest, total);
    }
}

/* The values of a tile as pairs, from the block's first key on. */
static const float *paired_values(const Block *b) {
    const Tile *t = b->tile;
    return t->work + (size_t)t->width * ROUND_UP(t->tokens, 16) + (size_t)b->first / 2 * t->width;
}

static inline __attribute__((always_inline)) void mix_rows(const Block *b, int rows) {
    const Tile *t = b->tile;
    float inverse[ATTENTION_ROWS], carry[ATTENTION_ROWS];
    const float *v = t->pairs ? paired_values(b) : t->v + b->first * t->stride;
    size_t stride = t->pairs ? (size_t)t->width : t->stride;
    int d = 0;
    soften_rows(b, inverse, carry);
    for (; d + 32 <= t->width; d += 32) mix_values(b, v, stride, inverse, carry, d, rows, 2);
    if (d < t->width) mix_values(b, v, stride, inverse, carry, d, rows, 1);
}

static void mix(const Block *b) {
    switch (b->rows) {
#define CASE(n) case n: mix_rows(b, n); break
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
#undef CASE
    }
}

/* AMX: the product of 16 rows of `count` pairs, in steps of 16, with 16 · `columns` columns. Strides are in floats. */
static inline __attribute__((always_inline)) void multiply_pairs(const float *a, size_t a_stride, const float *b,
                                                                 size_t b_stride, int count, int columns) {
    _tile_zero(0);
    if (columns > 1) _tile_zero(1);
    if (columns > 2) _tile_zero(2);
    if (columns > 3) _tile_zero(3);
    for (int i = 0; i < count; i += 16, b += 16 * b_stride) {
        _tile_loadd(4, a + i, a_stride * 4);
        _tile_loadd(5, b, b_stride * 4);
        _tile_dpbf16ps(0, 4, 5);
        if (columns > 1) {
            _tile_loadd(6, b + 16, b_stride * 4);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (columns > 2) {
            _tile_loadd(7, b + 32, b_stride * 4);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (columns > 3) {
            _tile_loadd(5, b + 48, b_stride * 4);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
}

static inline void store_tiles(float *to, size_t stride, int columns) {
    _tile_stored(0, to, stride * 4);
    if (columns > 1) _tile_stored(1, to + 16, stride * 4);
    if (columns > 2) _tile_stored(2, to + 32, stride * 4);
    if (columns > 3) _tile_stored(3, to + 48, stride * 4);
}

/* Scores of 16 rows; those past b->rows are meaningless. */
static void score_amx(const Block *b) {
    const Tile *t = b->tile;
    if (!t->pairs) {
        score(b);
        return;
    }
    Words words;
    size_t wide = ROUND_UP(t->tokens, 16);
    int count = ROUND_UP(b->last - b->first, 16), j = 0;
    const float *keys = t->work + b->first;
    pair_queries(b, words);
    for (; j + 64 <= count; j += 64) {
        multiply_pairs(words[0], MAX_PAIRED / 2, keys + j, wide, t->width / 2, 4);
        store_tiles(b->scores + j, b->score_stride, 4);
    }
    for (; j < count; j += 16) {
        multiply_pairs(words[0], MAX_PAIRED / 2, keys + j, wide, t->width / 2, 1);
        store_tiles(b->scores + j, b->score_stride, 1);
    }
    __m512 factor = _mm512_set1_ps(b->factor);
    for (int r = 0; r < b->rows; r++) {
        float *s = b->scores + r * b->score_stride;
        if (b->factor == 1.0f && !b->added[r]) continue;
        for (int i = 0; i < count; i += 16) {
            __m512 v = _mm512_mul_ps(_mm512_loadu_ps(s + i), factor);
            if (b->added[r]) v = _mm512_add_ps(v, _mm512_loadu_ps(b->added[r] + i));
            _mm512_storeu_ps(s + i, v);
        }
    }
}

static void mix_amx(const Block *b) {
    const Tile *t = b->tile;
    if (!t->pairs) {
        mix(b);
        return;
    }
    float inverse[ATTENTION_ROWS], carry[ATTENTION_ROWS], mixed[ATTENTION_ROWS][MAX_PAIRED];
    const float *v = paired_values(b);
    int pairs = ROUND_UP(b->last - b->first, 32) / 2, d = 0;
    soften_rows(b, inverse, carry);
    for (; d + 64 <= t->width; d += 64) {
        multiply_pairs(b->scores, b->score_stride, v + d, t->width, pairs, 4);
        store_tiles(mixed[0] + d, MAX_PAIRED, 4);
    }
    for (; d < t->width; d += 16) {
        multiply_pairs(b->scores, b->score_stride, v + d, t->width, pairs, 1);
        store_tiles(mixed[0] + d, MAX_PAIRED, 1);
    }
    for (int r = 0; r < b->rows; r++)
        for (int i = 0; i < t->width; i += 16) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(mixed[r] + i), _mm512_set1_ps(inverse[r]));
            if (b->largest) x = _mm512_fmadd_ps(_mm512_loadu_ps(b->to[r] + i), _mm512_set1_ps(carry[r]), x);
            _mm512_storeu_ps(b->to[r] + i, x);
        }
}

static int has_pairs(int width) { return width % 32 == 0 && width <= MAX_PAIRED && has_bfloat16(); }

#include "plain.h"

static void gather_terms(float *scores, int count, const int32_t *rows, const float *ours, const float *theirs, size_t stride) {
    const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i steps = _mm512_mullo_epi32(place, _mm512_set1_epi32((int)stride));
    for (int i = 0; i < count; i += 16) {
        __mmask16 mask = seen(i, 0, count);
        __m512i row = _mm512_maskz_loadu_epi32(mask, rows + i);
        __m512 added = _mm512_setzero_ps();
        if (ours) added = _mm512_mask_i32gather_ps(added, mask, row, ours, 4);
        if (theirs) {
            __m512 other = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_add_epi32(row, steps), theirs + i * stride, 4);
            added = _mm512_add_ps(added, other);
        }
        _mm512_mask_storeu_ps(scores + i, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, scores + i), added));
    }
}

/* ---- the rest --------------------------------------------------------------------------------------- */

static void embed(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 16) {
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(word + i))));
        v = _mm512_mul_ps(v, _mm512_set1_ps(scale));
        if (position) v = _mm512_add_ps(v, _mm512_loadu_ps(position + i));
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

/* 4·16 multiply-adds in each of 16 independent sums. */
static double multiply_adds_vnni(void) {
    enum { TIMES = 4000 };
    __m512i sum[16], x = _mm512_set1_epi8(1);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
    for (int n = 0; n < TIMES; n++) {
        for (int i = 0; i < 16; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
        __asm__ volatile("" : "+v"(x)); /* keeps the compiler from moving it out of the loop */
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
    .quantize = quantize, .has_pairs = has_pairs, .rows = 8, .prepare = prepare, .rotate = rotate,            \
    .add_terms = gather_terms, .layer_norm = layer_norm, .embed = embed, .mean = mean, .dot = dot

const Kernels amx_kernels = {
    .name = "amx",
    .why_not = amx_why_not,
    .begin = configure_tiles,
    .end = release_tiles,
    .product = product_amx,
    .paired_rows = 16,
    .score = score_amx,
    .mix = mix_amx,
    .multiply_adds = multiply_adds_amx,
    SHARED,
};

const Kernels vnni_kernels = {
    .name = "vnni",
    .why_not = vnni_why_not,
    .product = product_vnni,
    .paired_rows = 8,
    .score = score,
    .mix = mix,
    .multiply_adds = multiply_adds_vnni,
    SHARED,
};
#endif
