/* The operations of a layer, and their implementations.
 *
 * Hidden states are float32 (tokens, hidden), row by row. hidden and inner are multiples of 64. All implementations
 * quantize in the same way and sum int8 products exactly; in float32 they differ by rounding only.
 */
#ifndef NATIVE_KERNELS_H
#define NATIVE_KERNELS_H

#include <math.h>
#include <string.h>

#include "model.h"

/* Quantization of a row: float32 value ≈ scale · (uint8 value − MIDDLE) + center. */
typedef struct {
    float scale, center;
} Quantization;

typedef struct {
    float low, high;
} Range;

/* Maps a range onto 0 … 255. If all values are equal, any scale will do. */
static inline Quantization quantization_of(Range range) {
    float scale = (range.high - range.low) * (1.0f / 255.0f);
    return scale > 0.0f ? (Quantization){scale, range.low + MIDDLE * scale} : (Quantization){1.0f, range.low};
}

/* The operation applied to the output of a product before it is stored. RESIDUAL adds `other`; GATE multiplies by
 * `other`. */
typedef enum { PLAIN, GELU, RELU, RESIDUAL, GATE } Epilogue;

/* to = epilogue(x·W + b) */
typedef struct {
    const Linear *w;
    const uint8_t *x; /* (tokens rounded up to 16, w->in); rows past the end may hold anything */
    const Quantization *rows; /* quantization of x, (tokens) */
    int tokens;
    Epilogue epilogue;
    const float *other; /* (tokens, w->out), for RESIDUAL and GATE; may be `to` */
    float *to;          /* (tokens, w->out) */
} Product;

/* Under AddressSanitizer, GAP bytes that nothing may use follow each part of a buffer that several parts share. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { GAP = 256 };
#else
enum { GAP = 0 };
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

/* In texts of at least this many tokens, attention multiplies in bfloat16, because some processors have instructions
 * for it that are twice as fast: queries, keys, values and attention weights are rounded, sums are float32. */
enum { LONG = 128 };

/* x rounded to bfloat16, to nearest (ties: even); NaN stays NaN. */
static inline float bfloat16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    bits = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void round_to_bfloat16(float *x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = bfloat16_of(x[i]);
}

enum { ATTENTION_ROWS = 16 }; /* largest number of queries in a block */

/* Keys and values of a head for some of a text's tokens, or the rows of a table in place of keys. */
typedef struct {
    const float *k, *v; /* (tokens, stride); v NULL: no values */
    size_t stride;
    int tokens, width; /* width is a multiple of 16 */
    int pairs;         /* keys and values are multiplied as pairs of bfloat16: see has_pairs */
    int rounds;        /* attention weights are rounded to bfloat16 */
    float *work;       /* tile_work floats, filled by prepare */
} Tile;

/* Number of floats in Tile.work. Pairs of values are read in steps of 32 tokens, beginning at any multiple of 16, so
 * padding follows them. */
static inline size_t tile_work(int width, int tokens, int has_values) {
    size_t wide = ROUND_UP(tokens, 16);
    return width * (has_values ? wide + (wide + 32) / 2 : wide);
}

/* A few queries, and a range of the keys of a tile. */
typedef struct {
    const Tile *tile;
    int rows, first, last; /* keys first … last − 1 of the tile; first is a multiple of 16 */
    const float *q[ATTENTION_ROWS];
    int low[ATTENTION_ROWS], high[ATTENTION_ROWS]; /* each query's keys: low … high − 1, counted from `first` */
    const float *added[ATTENTION_ROWS];            /* offsets added to the scores, from `first` on; or NULL */
    float factor;                                  /* multiplies q·k */
    float *scores;                                 /* (rows, score_stride), from `first` on, rounded up to 16 */
    size_t score_stride;
    float *to[ATTENTION_ROWS];  /* (width) each */
    float *largest, *total;     /* (rows): see `mix`, over the tiles so far; NULL if there is only one tile */
} Block;

/* For `mix`: carry_of is the factor for a query's result over the previous tiles; update includes a tile in the
 * query's largest score and total. */
static inline float carry_of(float before, float largest) { return before == largest ? 1.0f : expf(before - largest); }

static inline void update(const Block *b, int row, float largest, float total) {
    b->total[row] = b->total[row] * carry_of(b->largest[row], largest) + total;
    b->largest[row] = largest;
}

typedef struct {
    const char *name;

    /* Reason why this machine cannot run the implementation; NULL if it can. Call the other
     * functions only if it returns NULL. */
    const char *(*why_not)(void);

    /* Called before and after the products of a thread; both may be NULL. */
    void (*begin)(void);
    void (*end)(void);

    /* x (tokens, width) to uint8, each row by its own range, rounded to nearest (ties: even); width is a multiple of
     * 64. rows: (tokens), written. */
    void (*quantize)(const float *x, int tokens, int width, Quantization *rows, uint8_t *to);

    void (*product)(const Product *p);

    /* True if attention in long texts multiplies pairs of bfloat16 numbers, for heads of this width; otherwise its
     * float32 inputs are rounded to bfloat16 beforehand. NULL: never. */
    int (*has_pairs)(int width);

    /* Largest number of queries of a block, without and with pairs. */
    int rows, paired_rows;

    /* Arrange a tile's keys and values in its `work`, as `score` and `mix` need them. */
    void (*prepare)(const Tile *tile);

    /* scores = factor · q·k + added. The tile need not have values. */
    void (*score)(const Block *b);

    /* to = softmax(scores)·V. With `largest` and `total`, which are updated: to = to · eᵃ + Σ exp(score − largest)·v,
     * where a is the old `largest` minus the new one, and `total` is the sum of all exponentials so far. Overwrites the
     * scores. */
    void (*mix)(const Block *b);

    /* Rotary positions: in each row, for each of `parts` parts of `width` values, rotate the first half of the part
     * against its second half. cos, sin: (tokens, width / 2). */
    void (*rotate)(float *rows, int tokens, size_t stride, int parts, int width, const float *cos, const float *sin);

    /* scores[i] += ours[rows[i]] + theirs[i · stride + rows[i]]; ours or theirs may be NULL. */
    void (*add_terms)(float *scores, int count, const int32_t *rows, const float *ours, const float *theirs, size_t stride);

    /* Layer norm of each row; from may be to. */
    void (*layer_norm)(const float *from, int tokens, int hidden, const Norm *norm, float *to);

    /* to = word · scale + position + type, for one row; position and type may be NULL. */
    void (*embed)(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to);

    /* Mean of all rows. */
    void (*mean)(const float *rows, int tokens, int hidden, float *to);

    /* Dot product; count is a multiple of 16. */
    float (*dot)(const float *a, const float *b, int count);

    /* Run int8 multiply-adds on registers, between begin() and end(), to measure the peak; returns their number. */
    double (*multiply_adds)(void);
} Kernels;

/* All implementations, the best first; the last one runs on every machine. To add an implementation, define its table
 * in a new file, and add its name here and the file to pyproject.toml. */
#define IMPLEMENTATIONS(X) X(amx) X(vnni) X(avxvnni) X(avx2) X(i8mm) X(dotprod) X(reference)

#define DECLARE(name) extern const Kernels name##_kernels;
IMPLEMENTATIONS(DECLARE)
#undef DECLARE

extern const Kernels *const all_kernels[];
extern const int num_kernels;

/* The implementation in use, chosen when the module loads: the first that this machine can run. */
extern const Kernels *kernels;

void choose_kernels(void);

#endif
