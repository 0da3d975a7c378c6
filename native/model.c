#define _GNU_SOURCE /* F_ADD_SEALS */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
enum { COLLAPSE = 25, FUTURE_WRITE = 16 }; /* MADV_COLLAPSE and F_SEAL_FUTURE_WRITE, which older headers lack */
#endif

int has_kernels(const Sizes *s) {
    return s->hidden >= 64 && s->hidden % 64 == 0 && s->hidden <= 8192 && s->inner >= 64 && s->inner % 64 == 0 &&
           s->inner <= 32768 && s->num_heads >= 1 && s->hidden % s->num_heads == 0 &&
           s->hidden / s->num_heads % 16 == 0 && s->num_layers >= 1 && s->num_layers <= MAX_LAYERS;
}

int is_complete(const Model *m, int layer) {
    const Layer *l = &m->layers[layer];
    if (layer == 0) return m->word_scales && m->positions && m->types && m->norm.shift;
    int has_norms = l->before_ffn.shift || (l->after_attention.shift && l->after_ffn.shift);
    return l->qkv.center && l->out.center && l->up.center && (l->gate.center || !m->has_gate) && l->down.center && has_norms;
}

void *copy_of(const void *from, size_t bytes) {
    void *to = aligned_alloc(64, ROUND_UP(bytes + 64, 64));
    if (to != NULL) memcpy(to, from, bytes);
    return to;
}

static size_t layer_size(const Model *m) {
    return (size_t)m->hidden * (4 * (size_t)m->hidden + (2 + m->has_gate) * (size_t)m->inner);
}

enum { HUGE_PAGE = 1 << 21 };

/* The block holds the tiles of all layers, then the table of words, then 64 bytes of padding that kernels may read. */
static size_t block_size(const Model *m) {
    return ROUND_UP(m->num_layers * layer_size(m) + (size_t)m->num_words * m->hidden + 64, HUGE_PAGE);
}

/* Map the block; returns -1 on failure. With huge pages there are hardly any TLB misses, and a single text takes a
 * fifth less time; malloc might reuse small pages. fd: memory that processes share; -1: none. */
static int get_block(Model *m, int fd) {
    size_t size = block_size(m);
#ifdef __linux__
    struct stat file;
    if (fd >= 0 && (m->is_filled ? fstat(fd, &file) || file.st_size != (off_t)size : ftruncate(fd, (off_t)size))) return -1;
    m->memory = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->memory == MAP_FAILED) return -1;
    m->tiles = (int8_t *)ROUND_UP((uintptr_t)m->memory, HUGE_PAGE);
    int access = m->is_filled ? PROT_READ : PROT_READ | PROT_WRITE;
    int kind = MAP_FIXED | (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
    if (mmap(m->tiles, size, access, kind, fd, 0) == MAP_FAILED) {
        munmap(m->memory, size + HUGE_PAGE);
        return -1;
    }
    madvise(m->tiles, size, MADV_HUGEPAGE);
#else
    if (fd >= 0) return -1;
    m->memory = malloc(size + HUGE_PAGE);
    if (m->memory == NULL) return -1;
    m->tiles = (int8_t *)ROUND_UP((uintptr_t)m->memory, HUGE_PAGE);
#endif
    m->words = m->tiles + m->num_layers * layer_size(m);
    return 0;
}

static void free_block(Model *m) {
#ifdef __linux__
    munmap(m->memory, block_size(m) + HUGE_PAGE);
#else
    free(m->memory);
#endif
}

Model *new_model(const Sizes *s, int fd, int is_filled) {
    Model *m = calloc(1, sizeof(Model));
    if (m == NULL) return NULL;
    *m = (Model){.hidden = s->hidden, .num_heads = s->num_heads, .inner = s->inner, .num_layers = s->num_layers,
                 .has_gate = s->has_gate, .num_words = s->num_words, .is_filled = is_filled};
    for (int i = 1; i <= m->num_layers; i++)
        m->layers[i].attention = (Attention){.num_heads = m->num_heads, .scale = 1.0f / sqrtf((float)(m->hidden / m->num_heads))};
    if (!get_block(m, fd)) return m;
    free(m);
    return NULL;
}

int seal_model(Model *m, int fd) {
#ifdef __linux__
    size_t size = block_size(m);
    /* Unless the system is configured otherwise, shared memory gets huge pages only if a process requests them, as is
     * possible since Linux 6.1. */
    madvise(m->tiles, size, COLLAPSE);
    int seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW;
    if (fcntl(fd, F_ADD_SEALS, seals | FUTURE_WRITE) && (errno != EINVAL || fcntl(fd, F_ADD_SEALS, seals)))
        return -1; /* EINVAL: Linux before 5.1 */
    if (mmap(m->tiles, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return -1;
    madvise(m->tiles, size, MADV_HUGEPAGE);
    m->is_filled = 1;
    return 0;
#else
    return -1;
#endif
}

Place place_of(Model *m, int layer, int which) {
    Layer *l = &m->layers[layer];
    int hidden = m->hidden, inner = m->inner, gated = m->has_gate ? inner : 0;
    Place all[NUM_LINEARS] = {{&l->qkv, hidden, 3 * hidden, NULL}, {&l->out, hidden, hidden, NULL},
                              {&l->up, hidden, inner, NULL}, {&l->gate, hidden, gated, NULL},
                              {&l->down, inner, hidden, NULL}};
    size_t before = (layer - 1) * layer_size(m);
    for (int i = 0; i < which; i++) before += (size_t)all[i].in * all[i].out;
    all[which].tiles = m->tiles + before;
    return all[which];
}

int8_t *end_of_tiles(const Model *m) { return m->tiles + m->num_layers * layer_size(m); }

int pack_linear(Linear *w, int in, int out, const int8_t *weights, const float *scale, const float *bias,
                int8_t *tiles, int8_t *end, int is_filled) {
    int8_t *to = is_filled ? NULL : tiles;
    *w = (Linear){.in = in, .out = out, .tiles = tiles, .end = end};
    w->scale = copy_of(scale, (size_t)out * 4);
    w->bias = copy_of(bias, (size_t)out * 4);
    w->offset = aligned_alloc(64, (size_t)out * 4);
    w->center = aligned_alloc(64, (size_t)out * 4);
    if (!w->scale || !w->bias || !w->offset || !w->center) return -1;
    for (int n = 0; n < out; n++) {
        int32_t sum = 0; /* MIDDLE · sum is at most 2^29, for up to 32768 inputs: no overflow */
        for (int k = 0; k < in; k++) {
            int8_t value = weights[(size_t)k * out + n];
            sum += value;
            if (to != NULL) to[tile_index(in, k, n)] = value;
        }
        w->offset[n] = MIDDLE * sum;
        w->center[n] = scale[n] * (float)sum;
    }
    return 0;
}

void free_linear(Linear *w) {
    free(w->scale);
    free(w->bias);
    free(w->offset);
    free(w->center);
}

void free_norm(Norm *n) {
    free(n->scale);
    free(n->shift);
}

void free_model(Model *m) {
    for (int i = 0; i <= m->num_layers; i++) {
        Layer *l = &m->layers[i];
        Linear *linears[] = {&l->qkv, &l->out, &l->up, &l->gate, &l->down};
        Norm *norms[] = {&l->before_attention, &l->after_attention, &l->before_ffn, &l->after_ffn};
        for (int j = 0; j < 5; j++) free_linear(linears[j]);
        for (int j = 0; j < 4; j++) free_norm(norms[j]);
        free(l->attention.offsets.values);
        free(l->attention.terms.buckets);
        free(l->attention.terms.keys);
        free(l->attention.terms.queries);
    }
    for (int i = 0; i < MAX_ROTATIONS; i++) {
        free(m->rotations[i].cos);
        free(m->rotations[i].sin);
    }
    free_norm(&m->norm);
    free(m->word_scales);
    free(m->positions);
    free(m->types);
    free_block(m);
    free(m);
}

void free_exits(Exits *e) {
    for (int i = 0; i <= e->num_layers; i++) {
        ExitHead *exit = &e->at[i];
        free_linear(&exit->projection);
        free_norm(&exit->norm);
        free(exit->tiles);
        free(exit->classifier);
        free(exit->bias);
        free(exit->prototypes);
    }
    free(e->head.dense);
    free(e->head.bias);
    free_norm(&e->head.norm);
    free(e);
}
