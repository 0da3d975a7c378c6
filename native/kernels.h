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

/* The operation applied to the output of a product before it is stored: for RESIDUAL `other` is added, for GATE it is
 * multiplied by `other`. */
typedef enum { PLAIN, GELU, RELU, RESIDUAL, GATE } Epilogue;

/* to = epilogue(x·W + b) */
typedef struct {
    const Linear *w;
    const uint8_t *x; /* (tokens rounded up to 16, w->in); rows past the end may hold anything */
    const Quantization *rows; /* of x, (tokens) */
    int tokens;
    Epilogue epilogue;
    const float *other; /* (tokens, w->out), for RESIDUAL and GATE; may be `to` */
    float *to;          /* (tokens, w->out) */
} Product;

/* Number of tokens from which attention multiplies in bfloat16, as some processors have instructions for it that are
 * twice as fast: queries, keys, values and attention weights are rounded, sums are float32. */
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

enum { ATTENTION_ROWS = 16 }; /* queries of a block, at most */

/* Keys and values of a head for some of a text's tokens, or the rows of a table in place of keys. */
typedef struct {
    const float *k, *v; /* (tokens, stride); v NULL: there are no values */
    size_t stride;
    int tokens, width; /* width is a multiple of 16 */
    int pairs;         /* they are multiplied as pairs of bfloat16: see has_pairs */
    int rounds;        /* attention weights are rounded to bfloat16 */
    float *work;       /* tile_work floats, filled by prepare */
} Tile;

/* Values may be read up to the end of 32 tokens, from any 16th on. */
static inline size_t tile_work(int width, int tokens, int has_values) {
    size_t wide = ROUND_UP(tokens, 16);
    return width * (has_values ? wide + (wide + 32) / 2 : wide);
}

/* A few queries, and a range of the keys of a tile. */
typedef struct {
    const Tile *tile;
    int rows, first, last; /* keys first … last − 1 of the tile; first is a multiple of 16 */
    const float *q[ATTENTION_ROWS];
    int low[ATTENTION_ROWS], high[ATTENTION_ROWS]; /* each query's keys, low … high − 1, counted from `first` */
    const float *added[ATTENTION_ROWS];            /* to the scores, from `first` on; or NULL */
    float factor;                                  /* of the scores */
    float *scores;                                 /* (rows, score_stride), from `first` on, rounded up to 16 */
    size_t score_stride;
    float *to[ATTENTION_ROWS];  /* (width) each */
    float *largest, *total;     /* (rows): of the tiles before, if there are several; otherwise NULL */
} Block;

/* For `mix`: the factor of what a query has from the tiles before, and what it keeps for the next. */
static inline float carry_of(float before, float largest) { return before == largest ? 1.0f : expf(before - largest); }

static inline void update(const Block *b, int row, float largest, float total) {
    b->total[row] = b->total[row] * carry_of(b->largest[row], largest) + total;
    b->largest[row] = largest;
}

typedef struct {
    const char *name;

    /* Reason why this machine cannot run it; NULL if it can. Call the other functions only if it returns NULL. */
    const char *(*why_not)(void);

    /* Called before and after a thread's products; may be NULL. */
    void (*begin)(void);
    void (*end)(void);

    /* x (tokens, width) to uint8, each row by its own range, rounded to nearest (ties: even); width is a multiple of
     * 64. rows: (tokens), written. */
    void (*quantize)(const float *x, int tokens, int width, Quantization *rows, uint8_t *to);

    void (*product)(const Product *p);

    /* True if attention in long texts multiplies pairs of bfloat16 numbers; otherwise it gets numbers that are rounded to
     * bfloat16. NULL: never. */
    int (*has_pairs)(int width);

    /* Largest number of queries of a block, without and with pairs. */
    int rows, paired_rows;

    /* Arrange a tile's keys and values. */
    void (*prepare)(const Tile *tile);

    /* scores = factor · q·k + added. The tile may have no values. */
    void (*score)(const Block *b);

    /* to = softmax(scores)·V. With `largest` and `total`, which are updated: to = to · eᵃ + Σ exp(score − largest)·v, where
     * a is the change of `largest`, and `total` is the sum of all exponentials so far. Overwrites the scores. */
    void (*mix)(const Block *b);

    /* For each row: the first half of each of `parts` parts of `width` values is rotated against its second half.
     * cos, sin: (tokens, width / 2). */
    void (*rotate)(float *rows, int tokens, size_t stride, int parts, int width, const float *cos, const float *sin);

    /* scores[i] += ours[rows[i]] + theirs[i · stride + rows[i]]; ours or theirs may be NULL. */
    void (*add_terms)(float *scores, int count, const int32_t *rows, const float *ours, const float *theirs, size_t stride);

    /* Row by row; from may be to. */
    void (*layer_norm)(const float *from, int tokens, int hidden, const Norm *norm, float *to);

    /* One row, word · scale + position + type; position and type may be NULL. */
    void (*embed)(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to);

    /* Mean of all rows. */
    void (*mean)(const float *rows, int tokens, int hidden, float *to);

    /* count is a multiple of 16. */
    float (*dot)(const float *a, const float *b, int count);

    /* Run int8 multiply-adds on registers, between begin() and end(), to measure the peak; returns their number. */
    double (*multiply_adds)(void);
} Kernels;

/* All implementations, the best first; the last one runs on every machine. To add one, define its table in a new file,
 * and add its name here and the file to pyproject.toml. */
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
