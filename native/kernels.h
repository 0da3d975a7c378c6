/* The operations of a layer, and their implementations.
 *
 * Hidden states are float32 (tokens, hidden), row by row. hidden and inner are multiples of 64. All implementations
 * quantize in the same way and sum int8 products exactly; in float32 they differ by rounding only.
 */
#ifndef NATIVE_KERNELS_H
#define NATIVE_KERNELS_H

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

/* The operation applied to the output of a product before it is stored. */
typedef enum { PLAIN, GELU, RELU, RESIDUAL } Epilogue;

/* to = epilogue(x·W + b) */
typedef struct {
    const Linear *w;
    const uint8_t *x; /* (tokens rounded up to 16, w->in); rows past the end may hold anything */
    const Quantization *rows; /* of x, (tokens) */
    int tokens;
    Epilogue epilogue;
    const float *residual; /* (tokens, w->out), for RESIDUAL */
    float *to;             /* (tokens, w->out) */
} Product;

/* Offsets of a query's attention scores, from key 0 on; NULL: none. */
static inline const float *offsets_of(const Offsets *offsets, int head, int query) {
    return offsets->values ? offsets->values + head * offsets_stride(offsets->positions) + offsets->positions - 1 - query : NULL;
}

enum { ATTENTION_ROWS = 8 };

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

/* Size of the buffer `work` of attention, in floats. */
static inline size_t attention_work(int width, int tokens) {
    return (3 * (size_t)width / 2 + 1 + ATTENTION_ROWS) * ROUND_UP(tokens, 16);
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

    /* softmax(Q·Kᵀ/√width + offsets)·V for each head; width = hidden / num_heads is a multiple of 16. qkv is (tokens,
     * 3·hidden) and may be overwritten, to is (tokens, hidden). work: attention_work floats. */
    void (*attention)(float *qkv, int tokens, int hidden, int num_heads, const Offsets *offsets, float *work,
                      float *to);

    /* In place, row by row. */
    void (*layer_norm)(float *rows, int tokens, int hidden, const Norm *norm);

    /* One row, word · scale + position + type; type may be NULL. */
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
