#include "layers.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

static pthread_key_t buffer_key;
static pthread_once_t buffer_once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&buffer_key, free); }

/* A buffer of the calling thread, kept for its next call and freed when the thread ends. */
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

/* Bytes of quantized rows: how each was quantized, and its values, with room for whole tiles. */
static size_t rows_size(int tokens) { return ROUND_UP(tokens * sizeof(Quantization), 64); }
static size_t quantized_size(int tokens, int width) {
    return rows_size(tokens) + (size_t)ROUND_UP(tokens, 16) * width;
}

/* ONNX's DynamicQuantizeLinear: the range of all values, with 0 in it, onto 0 … 255, and 0 onto a whole number. */
static Quantization quantization_of_text(Range range, int *zero) {
    float min = fminf(range.low, 0.0f), max = fmaxf(range.high, 0.0f);
    float scale = max == min ? 1.0f : (max - min) / 255.0f;
    *zero = (int)nearbyintf(fminf(fmaxf(-min / scale, 0.0f), 255.0f));
    return (Quantization){scale, 0.0f};
}

/* to = x·W + b and what follows; x is (tokens, in). quantized: scratch of quantized_size bytes. */
static void multiply(const Model *m, const Linear *w, const float *x, int tokens, Then then, const float *residual,
                     char *quantized, float *to) {
    const Kernels *k = kernels;
    Quantization *rows = (Quantization *)quantized, shared;
    uint8_t *bytes = (uint8_t *)quantized + rows_size(tokens);
    int zero = MIDDLE;
    if (!m->by_token) shared = quantization_of_text(k->range(x, (size_t)tokens * w->in), &zero);
    k->quantize(x, tokens, w->in, m->by_token ? NULL : &shared, zero, rows, bytes);
    Product p = {w, bytes, rows, zero, tokens, then, residual, to};
    k->product(&p);
}

int run_layer(const Model *m, int number, const float *from, int tokens, float *to) {
    const Kernels *k = kernels;
    const Layer *layer = &m->layers[number];
    int hidden = m->hidden, padded = ROUND_UP(tokens, 16), inner = m->inner;
    size_t count = (size_t)tokens * hidden, states = ROUND_UP(count * 4, 64);
    size_t widest = ROUND_UP((size_t)(inner > 3 * hidden ? inner : 3 * hidden) * tokens * 4, 64);
    size_t quantized = quantized_size(tokens, inner > hidden ? inner : hidden);
    size_t attention = (size_t)(hidden / m->num_heads + ATTENTION_ROWS) * padded * 4;
    char *memory = scratch(widest + quantized + 2 * states + attention);
    if (memory == NULL) return -1;
    float *values = (float *)memory; /* query, key and value; then the feed-forward network's middle */
    char *bytes = memory + widest;
    float *context = (float *)(bytes + quantized), *middle = context + states / 4;
    float *work = middle + states / 4;

    if (k->begin) k->begin();
    multiply(m, &layer->qkv, from, tokens, PLAIN, NULL, bytes, values);
    k->attention(values, tokens, hidden, m->num_heads, work, context);
    multiply(m, &layer->out, context, tokens, RESIDUAL, from, bytes, middle);
    k->layer_norm(middle, tokens, hidden, &layer->after_attention);
    multiply(m, &layer->up, middle, tokens, m->has_gelu ? GELU : RELU, NULL, bytes, values);
    multiply(m, &layer->down, values, tokens, RESIDUAL, middle, bytes, to);
    if (k->end) k->end();
    k->layer_norm(to, tokens, hidden, &layer->after_ffn);
    return 0;
}

int run_embeddings(const Model *m, const int64_t *ids, const int64_t *types, int tokens, float *to) {
    const Kernels *k = kernels;
    size_t hidden = m->hidden;
    for (int t = 0; t < tokens; t++) {
        if (ids[t] < 0 || ids[t] >= m->num_words || t >= m->num_positions) return -1;
        if (m->num_types && (types[t] < 0 || types[t] >= m->num_types)) return -1;
        k->embed(m->words + ids[t] * hidden, m->word_scales[ids[t]], m->positions + t * hidden,
                 m->num_types ? m->types + types[t] * hidden : NULL, m->hidden, to + t * hidden);
    }
    k->layer_norm(to, tokens, m->hidden, &m->norm);
    return 0;
}

/* What the last exit's classifier sees: to = activation(dense · pooled + bias), (hidden). */
static void run_head(const Head *head, const float *pooled, int hidden, float *to) {
    for (int i = 0; i < hidden; i++) {
        float x = head->bias[i] + kernels->dot(pooled, head->dense + (size_t)i * hidden, hidden);
        switch (head->activation) {
        case HEAD_TANH: x = tanhf(x); break;
        case HEAD_RELU: x = x < 0.0f ? 0.0f : x; break; /* NaN stays */
        default: x = 0.5f * x * (1.0f + erff(x * 0.70710678f));
        }
        to[i] = x;
    }
}

int run_exit(const Model *m, int layer, const float *hidden_states, int tokens, const float *prototypes,
             float *logits, float *distances) {
    const Kernels *k = kernels;
    const ExitHead *head = &m->exits[layer];
    int hidden = m->hidden, metric = head->metric;
    size_t states = ROUND_UP((size_t)hidden * 4, 64), space = ROUND_UP((size_t)metric * 4, 64);
    char *memory = scratch(2 * states + space + quantized_size(1, hidden));
    if (memory == NULL) return -1;
    float *pooled = (float *)memory, *embedded = (float *)(memory + states);
    float *seen = (float *)(memory + states + space); /* by the classifier */

    int has_head = layer == m->num_layers && m->head.dense;
    if (has_head ? m->head.has_mean : m->has_mean) k->mean(hidden_states, tokens, hidden, pooled);
    else memcpy(pooled, hidden_states, (size_t)hidden * 4);
    if (has_head) run_head(&m->head, pooled, hidden, seen);
    else seen = pooled;
    int is_finite = 1;
    for (int i = 0; i < head->num_labels; i++) {
        logits[i] = head->bias[i] + k->dot(seen, head->classifier + (size_t)i * hidden, hidden);
        is_finite = is_finite && isfinite(logits[i]);
    }
    if (!metric) return 0;
    if (!is_finite) { /* int8 would make numbers of it */
        for (int i = 0; i < head->num_labels; i++) distances[i] = NAN;
        return 0;
    }
    if (k->begin) k->begin();
    multiply(m, &head->projection, pooled, 1, PLAIN, NULL, memory + 2 * states + space, embedded);
    if (k->end) k->end();
    float length = sqrtf(k->dot(embedded, embedded, metric));
    for (int i = 0; i < head->num_labels; i++) {
        float cosine = k->dot(embedded, prototypes + (size_t)i * metric, metric);
        distances[i] = 1.0f - (length == 0 ? 0.0f : cosine / length);
    }
    return 0;
}

/* Compute an exit, and the decision. */
static int ask(const Model *m, int layer, Pass *p, const float *prototypes, double far) {
    const ExitHead *head = &m->exits[layer];
    float *logits = p->logits + (size_t)layer * head->num_labels;
    float *distances = head->metric ? p->distances + (size_t)layer * head->num_labels : NULL;
    if (run_exit(m, layer, p->hidden, p->tokens, prototypes, logits, distances)) return -1;
    Reading *reading = &p->readings[p->num_readings++];
    *reading = read_exit(layer, logits, distances, p->thresholds, head->num_labels);
    if (reading->nearest > far && !p->is_far) {
        p->is_far = 1;
        p->tau *= p->caution;
    }
    if (layer == p->deepest || exits(score(p->signal, p->readings, p->num_readings), p->tau)) p->exit_layer = layer;
    return 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int run_passes(const Model *m, Pass *passes, int count, const float *const *prototypes, const double *far) {
    for (int layer = 0; layer <= m->num_layers; layer++)
        for (int i = 0; i < count; i++) {
            Pass *p = &passes[i];
            if (p->exit_layer >= 0) continue;
            double start = now();
            int failed = layer ? run_layer(m, layer, p->hidden, p->tokens, p->hidden)
                               : run_embeddings(m, p->ids, p->types, p->tokens, p->hidden);
            int is_asked = m->exits[layer].is_set && (p->ask_all || p->tau > 0.0 || layer == p->deepest);
            if (!failed && is_asked) failed = ask(m, layer, p, prototypes[layer], far ? far[layer] : INFINITY);
            if (failed) return -1;
            p->seconds += now() - start;
        }
    return 0;
}
