#include "model.h"

#include <stdlib.h>
#include <string.h>

int has_kernels(int hidden, int num_heads, int inner, int num_layers) {
    return hidden >= 64 && hidden % 64 == 0 && hidden <= 8192 && inner >= 64 && inner % 64 == 0 && inner <= 32768 &&
           num_heads >= 1 && hidden % num_heads == 0 && hidden / num_heads % 16 == 0 && num_layers >= 1 &&
           num_layers <= MAX_LAYERS;
}

int is_complete(const Model *m, int layer) {
    const Layer *l = &m->layers[layer];
    if (layer == 0) return m->words && m->word_scales && m->positions && m->types && m->norm.shift;
    return l->qkv.center && l->out.center && l->up.center && l->down.center && l->after_attention.shift &&
           l->after_ffn.shift;
}

void *copy_of(const void *from, size_t bytes) {
    void *to = aligned_alloc(64, ROUND_UP(bytes + 64, 64));
    if (to != NULL) memcpy(to, from, bytes);
    return to;
}

int pack_linear(Linear *w, int in, int out, const int8_t *weights, const float *scale, const float *bias) {
    *w = (Linear){.in = in, .out = out};
    w->tiles = aligned_alloc(64, (size_t)in * out);
    w->scale = copy_of(scale, (size_t)out * 4);
    w->bias = copy_of(bias, (size_t)out * 4);
    w->sums = aligned_alloc(64, (size_t)out * 4);
    w->center = aligned_alloc(64, (size_t)out * 4);
    if (!w->tiles || !w->scale || !w->bias || !w->sums || !w->center) return -1;
    for (int n = 0; n < out; n++) {
        w->sums[n] = 0;
        for (int k = 0; k < in; k++) {
            int8_t value = weights[(size_t)k * out + n];
            w->sums[n] += value;
            w->tiles[tile_index(in, k, n)] = value;
        }
        w->center[n] = scale[n] * (float)w->sums[n];
    }
    return 0;
}

void free_linear(Linear *w) {
    free(w->tiles);
    free(w->scale);
    free(w->bias);
    free(w->sums);
    free(w->center);
}

void free_norm(Norm *n) {
    free(n->scale);
    free(n->shift);
}

void free_model(Model *m) {
    for (int i = 0; i <= m->num_layers; i++) {
        Layer *l = &m->layers[i];
        Linear *all[] = {&l->qkv, &l->out, &l->up, &l->down, &m->exits[i].projection};
        for (int j = 0; j < 5; j++) free_linear(all[j]);
        free_norm(&l->after_attention);
        free_norm(&l->after_ffn);
        free(m->exits[i].classifier);
        free(m->exits[i].bias);
    }
    free(m->head.dense);
    free(m->head.bias);
    free_norm(&m->norm);
    free(m->words);
    free(m->word_scales);
    free(m->positions);
    free(m->types);
    free(m);
}
