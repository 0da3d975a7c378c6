/* A model: the weights of an artifact's int8 encoder, and those of its exits, apart, as several models can have the same
 * encoder.
 *
 * Both are read-only once built, so threads share them. Names of sizes: in and out of a linear layer, hidden for the width
 * of the hidden states, inner for the width inside the feed-forward network.
 */
#ifndef NATIVE_MODEL_H
#define NATIVE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#define MAX_LAYERS 100
#define MAX_ROTATIONS 4
enum { MIDDLE = 128 }; /* uint8 value of the center of a row's range */
#define ROUND_UP(n, to) (((n) + (to)-1) / (to) * (to))

/* x·W + b, with W (in, out) in int8; in is a multiple of 64, out a multiple of 32. */
typedef struct {
    int in, out;
    int8_t *tiles;   /* W, (out / 16, in / 64) tiles of 1024 bytes: see tile_index */
    int8_t *end;     /* end of the tiles that run after these: prefetching is useful up to there */
    float *scale;    /* (out) */
    float *bias;     /* (out) */
    int32_t *offset; /* (out): MIDDLE · the sum of an output's weights, to subtract from products of uint8 values */
    float *center;   /* (out): scale · that sum, to multiply by a row's center and add to its output */
} Linear;

/* Offsets of attention scores by head and distance between query and key; values NULL: none. */
typedef struct {
    int positions; /* P: largest number of tokens */
    float *values; /* (num_heads, offsets_stride(P)): for key − query = 1 − P … P − 1, then 16 zeros */
} Offsets;

static inline size_t offsets_stride(int positions) { return 2 * (size_t)positions - 1 + 16; }

/* Rotary positions: each head's first half is rotated against its second. Layers can share them; cos NULL: none. */
typedef struct {
    int positions;    /* P: largest number of tokens */
    float *cos, *sin; /* (P, width / 2), width = hidden / num_heads */
} Rotation;

/* DeBERTa's terms of the attention scores: the query times a row of `keys`, and the key times a row of `queries`. Each
 * head has its own tables, with a row for each bucket of distances; a table is NULL if the model lacks its term. */
typedef struct {
    int positions, rows;   /* P; R */
    int32_t *buckets;      /* (2·P − 1): row for key − query = 1 − P … P − 1, descending */
    float *keys, *queries; /* (num_heads, R, width) */
} Terms;

/* The attention of a layer. */
typedef struct {
    int num_heads, window; /* window: largest distance between a query and its keys; 0: any */
    float scale;           /* factor of Q·Kᵀ */
    Offsets offsets;
    const Rotation *rotation; /* NULL: none */
    Terms terms;
} Attention;

typedef struct {
    float *scale, *shift; /* (hidden); NULL: no norm */
    float epsilon;
} Norm;

typedef struct {
    int is_set, num_labels, metric; /* metric: dimension of the metric space; 0: no prototypes */
    Norm norm;                      /* applied to the tokens before pooling */
    float *classifier, *bias;       /* (num_labels, hidden), (num_labels) */
    float *prototypes;              /* (num_labels, metric), unit rows */
    Linear projection;              /* into the metric space */
    int8_t *tiles;                  /* tiles of the projection */
} ExitHead;

/* What an exit classifies: the first token, the mean of the tokens, or each token. */
typedef enum { FIRST_TOKEN, MEAN_TOKEN, EVERY_TOKEN, NUM_POOLINGS } Pooling;

/* A stock classifier's layer before the last exit's classifier: norm(activation(dense · pooled + bias)). */
typedef struct {
    float *dense, *bias; /* (hidden, hidden), a row for each output; (hidden). NULL: no such layer */
    enum { HEAD_TANH, HEAD_RELU, HEAD_GELU, NUM_HEAD_ACTIVATIONS } activation;
    Pooling pooling; /* like Exits.pooling, for this exit */
    Norm norm;    /* applied before the classifier */
} Head;

/* The exits of a model. */
typedef struct {
    int hidden, num_layers; /* num_layers: layer of the last exit; the encoder may have more layers */
    Pooling pooling;
    ExitHead at[MAX_LAYERS + 1]; /* indexed by layer, from 0 */
    Head head;                   /* head of the last exit */
} Exits;

/* x = from + out(attention(qkv(before_attention(from)))), then y = after_attention(x) and
 * to = after_ffn(y + down(activation(up(before_ffn(y))) · gate(before_ffn(y)))); norms and the gate are optional. */
typedef struct {
    Linear qkv, out, up, gate, down;
    Attention attention;
    Norm before_attention, after_attention, before_ffn, after_ffn;
} Layer;

/* Sizes of a model. has_gate: the feed-forward networks have gates. */
typedef struct {
    int hidden, num_heads, inner, num_layers, num_words, has_gate;
} Sizes;

typedef struct {
    int hidden, num_heads, inner, num_layers, has_gate;
    int has_gelu;  /* activation: GELU, otherwise ReLU */
    int num_words, num_positions, num_types; /* num_positions, num_types: 0 without such a table */
    int8_t *words;                 /* (num_words, hidden), after the tiles */
    float *word_scales;            /* (num_words) */
    float *positions, *types;      /* (num_positions, hidden), (num_types, hidden) */
    Norm norm;                     /* norm of the embeddings */
    int8_t *tiles;                 /* tiles of all layers, in execution order */
    void *memory;                  /* mapping that holds the tiles and the words */
    int is_filled;                 /* another process has already written the tiles and the words to shared memory */
    Layer layers[MAX_LAYERS + 1];  /* indexed from 1 */
    Rotation rotations[MAX_ROTATIONS];
} Model;

/* Index of a weight in Linear.tiles. A tile holds 64 inputs of 16 outputs; four inputs of an output are adjacent, as
 * the int8 instructions of AMX, AVX-512 VNNI and others expect. */
static inline size_t tile_index(int in, int input, int output) {
    size_t tile = (size_t)(output / 16) * (in / 64) + input / 64;
    return tile * 1024 + input % 64 / 4 * 64 + output % 16 * 4 + input % 4;
}

/* True if the kernels support these sizes. */
int has_kernels(const Sizes *sizes);

/* True if all weights of a layer are set; layer 0 is the embeddings. */
int is_complete(const Model *m, int layer);

/* A copy aligned to 64 bytes, with 64 bytes after it; NULL: out of memory. */
void *copy_of(const void *from, size_t bytes);

/* A model without weights; NULL: out of memory, or fd cannot be used.
 * fd: from memfd_create, for the tiles and the words, which processes share; -1: none. is_filled: filled and sealed. */
Model *new_model(const Sizes *sizes, int fd, int is_filled);

/* Make the shared memory of a complete model permanently read-only: for all processes or, before Linux 5.1, for this
 * one. Returns -1 if that fails. */
int seal_model(Model *m, int fd);

/* A linear layer, its sizes and the address of its tiles. `which` in place_of: 0 qkv, 1 out, 2 up, 3 gate, 4 down. */
typedef struct {
    Linear *linear;
    int in, out;
    int8_t *tiles;
} Place;
enum { NUM_LINEARS = 5, GATE_LINEAR = 3 };
Place place_of(Model *m, int layer, int which);

/* Set a linear layer, and pack its weights (in, out), row by row, into the tiles, unless is_filled. Returns -1 if out
 * of memory; call free_linear in either case. */
int pack_linear(Linear *w, int in, int out, const int8_t *weights, const float *scale, const float *bias,
                int8_t *tiles, int8_t *end, int is_filled);

/* End of the tiles of all layers. */
int8_t *end_of_tiles(const Model *m);

/* free_linear does not free the tiles, which belong to the Model or ExitHead. */
void free_linear(Linear *w);
void free_norm(Norm *n);
void free_model(Model *m);
void free_exits(Exits *e);

#endif
