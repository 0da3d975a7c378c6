#define _GNU_SOURCE /* SCHED_IDLE */
#include "layers.h"

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "kernels.h"

static pthread_key_t buffer_key;
static pthread_once_t buffer_once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&buffer_key, free); }

/* A buffer of the calling thread, reused by the thread's next call and freed when the thread ends. */
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
    if (buffer != NULL) {
        ASAN_UNPOISON_MEMORY_REGION(buffer, bytes);
        ASAN_POISON_MEMORY_REGION((char *)buffer + bytes, size - bytes);
    }
    return buffer;
}

/* Bytes of quantized rows: the Quantization of each row, then the values of all rows, padded to whole tiles. */
static size_t rows_size(int tokens) { return ROUND_UP(tokens * sizeof(Quantization), 64); }
static size_t quantized_size(int tokens, int width) {
    return rows_size(tokens) + (size_t)ROUND_UP(tokens, 16) * width;
}

/* to = epilogue(x·W + b) for quantized x (tokens, in). */
static void multiply_quantized(const Linear *w, const char *quantized, int tokens, Epilogue epilogue, const float *other,
                               float *to) {
    const Quantization *rows = (const Quantization *)quantized;
    const uint8_t *bytes = (const uint8_t *)quantized + rows_size(tokens);
    kernels->product(&(Product){w, bytes, rows, tokens, epilogue, other, to});
}

/* to = epilogue(x·W + b) for x (tokens, in). quantized: quantized_size bytes of scratch, which then hold x. */
static void multiply(const Linear *w, const float *x, int tokens, Epilogue epilogue, const float *other,
                     char *quantized, float *to) {
    kernels->quantize(x, tokens, w->in, (Quantization *)quantized, (uint8_t *)quantized + rows_size(tokens));
    multiply_quantized(w, quantized, tokens, epilogue, other, to);
}

/* Number of rows that the products of a layer handle together: enough to amortize reading the weights, few enough
 * for intermediate results to stay in the L2 cache. */
enum { BLOCK = 64 };

enum { ROWS = 16 }; /* tokens that a token classifier handles together */

/* Buffers of a block, parts of scratch. */
typedef struct {
    char *quantized;
    float *qkv, *context, *middle, *inner, *work;
} Memory;

static int get_memory(const Model *m, const Layer *layer, int rows, int part, int longest, Memory *to) {
    size_t hidden = m->hidden;
    size_t widest = quantized_size(part, m->inner > m->hidden ? m->inner : m->hidden);
    size_t work = attention_work(&layer->attention, m->hidden / m->num_heads, longest);
    size_t sizes[] = {ROUND_UP(widest, 64), rows * 3 * hidden * 4, rows * hidden * 4, part * hidden * 4, (size_t)part * m->inner * 4,
                      ROUND_UP(work * 4, 64)};
    size_t total = 0;
    for (int i = 0; i < 6; i++) total += sizes[i] + GAP;
    char *memory = scratch(total);
    if (memory == NULL) return -1;
    float **places[] = {&to->qkv, &to->context, &to->middle, &to->inner, &to->work};
    to->quantized = memory;
    for (int i = 0; i < 6; i++) {
        ASAN_POISON_MEMORY_REGION(memory + sizes[i], GAP);
        memory += sizes[i] + GAP;
        if (i < 5) *places[i] = (float *)memory;
    }
    return 0;
}

/* The rows; if there is a norm, the normalized rows, which are written to `space`. */
static const float *normed(const float *rows, int count, int hidden, const Norm *norm, float *space) {
    if (norm->scale == NULL) return rows;
    kernels->layer_norm(rows, count, hidden, norm, space);
    return space;
}

static void normalize(float *rows, int count, int hidden, const Norm *norm) { normed(rows, count, hidden, norm, rows); }

/* The rest of a layer after attention, where each row is independent of the others. Overwrites context. */
static void run_rows(const Model *m, const Layer *layer, const float *from, float *context, int rows,
                     const Memory *memory, float *to) {
    char *quantized = memory->quantized;
    float *middle = memory->middle, *inner = memory->inner;
    multiply(&layer->out, context, rows, RESIDUAL, from, quantized, middle);
    normalize(middle, rows, m->hidden, &layer->after_attention);
    const float *x = normed(middle, rows, m->hidden, &layer->before_ffn, context);
    multiply(&layer->up, x, rows, m->has_gelu ? GELU : RELU, NULL, quantized, inner);
    if (m->has_gate) multiply_quantized(&layer->gate, quantized, rows, GATE, inner, inner);
    multiply(&layer->down, inner, rows, RESIDUAL, middle, quantized, to);
    normalize(to, rows, m->hidden, &layer->after_ffn);
}

/* Run a layer for `count` texts with `rows` tokens in total. */
static int run_block(const Model *m, const Layer *layer, const float *from, const int *tokens, int count, int rows,
                     float *to) {
    const Kernels *k = kernels;
    size_t hidden = m->hidden;
    int longest = 0, parts = (rows + BLOCK - 1) / BLOCK; /* parts of about the same size, across texts */
    for (int i = 0; i < count; i++) longest = tokens[i] > longest ? tokens[i] : longest;
    Memory memory;
    if (get_memory(m, layer, rows, (rows + parts - 1) / parts, longest, &memory)) return -1;
    if (k->begin) k->begin();
    for (int i = 0; i < parts; i++) {
        int row = rows * i / parts, part = rows * (i + 1) / parts - row;
        const float *x = normed(from + row * hidden, part, m->hidden, &layer->before_attention, memory.middle);
        multiply(&layer->qkv, x, part, PLAIN, NULL, memory.quantized, memory.qkv + row * 3 * hidden);
    }
    for (int i = 0, row = 0; i < count; row += tokens[i++])
        attend(&layer->attention, memory.qkv + row * 3 * hidden, tokens[i], m->hidden, memory.work,
               memory.context + row * hidden);
    for (int i = 0; i < parts; i++) {
        int row = rows * i / parts, part = rows * (i + 1) / parts - row;
        run_rows(m, layer, from + row * hidden, memory.context + row * hidden, part, &memory, to + row * hidden);
    }
    if (k->end) k->end();
    return 0;
}

/* Number of tokens of the longest text that the layer's tables allow. */
static int most_tokens(const Attention *a) {
    int most = INT_MAX;
    if (a->offsets.values && a->offsets.positions < most) most = a->offsets.positions;
    if (a->rotation && a->rotation->positions < most) most = a->rotation->positions;
    if (a->terms.buckets && a->terms.positions < most) most = a->terms.positions;
    return most;
}

int run_layer(const Model *m, int number, const float *from, const int *tokens, int count, float *to) {
    const Layer *layer = &m->layers[number];
    int most = most_tokens(&layer->attention);
    for (int i = 0; i < count;) {
        int first = i, rows = 0;
        do {
            if (tokens[i] > most) return -1;
            rows += tokens[i++];
        } while (i < count && rows + tokens[i] <= BLOCK);
        if (run_block(m, layer, from, tokens + first, i - first, rows, to)) return -1;
        from += (size_t)rows * m->hidden;
        to += (size_t)rows * m->hidden;
    }
    return 0;
}

int run_embeddings(const Model *m, const int64_t *ids, const int64_t *types, int tokens, float *to) {
    const Kernels *k = kernels;
    size_t hidden = m->hidden;
    for (int t = 0; t < tokens; t++) {
        if (ids[t] < 0 || ids[t] >= m->num_words || (m->num_positions && t >= m->num_positions)) return -1;
        if (m->num_types && (types[t] < 0 || types[t] >= m->num_types)) return -1;
        k->embed(m->words + ids[t] * hidden, m->word_scales[ids[t]],
                 m->num_positions ? m->positions + t * hidden : NULL, m->num_types ? m->types + types[t] * hidden : NULL, m->hidden, to + t * hidden);
    }
    normalize(to, tokens, m->hidden, &m->norm);
    return 0;
}

/* Input of the last exit's classifier: to = norm(activation(dense · pooled + bias)), (hidden). */
static void run_head(const Head *head, const float *pooled, int hidden, float *to) {
    for (int i = 0; i < hidden; i++) {
        float x = head->bias[i] + kernels->dot(pooled, head->dense + (size_t)i * hidden, hidden);
        switch (head->activation) {
        case HEAD_TANH: x = tanhf(x); break;
        case HEAD_RELU: x = x < 0.0f ? 0.0f : x; break; /* keeps NaN */
        default: x = 0.5f * x * (1.0f + erff(x * 0.70710678f));
        }
        to[i] = x;
    }
    normalize(to, 1, hidden, &head->norm);
}

/* The logits of each token: to = classifier · head(norm(row)) + bias, (tokens, num_labels). A few rows are handled
 * together, so that they stay in the cache. Returns -1 if memory runs out. */
static int run_tokens(const Exits *e, int layer, const float *rows, int tokens, float *to) {
    const ExitHead *head = &e->at[layer];
    const Head *top = layer == e->num_layers && e->head.dense ? &e->head : NULL;
    int hidden = e->hidden;
    size_t block = (size_t)ROWS * hidden;
    float *space = scratch((top ? 2 : 1) * block * 4);
    if (space == NULL) return -1;
    for (int first = 0; first < tokens; first += ROWS) {
        int count = tokens - first < ROWS ? tokens - first : ROWS;
        const float *x = normed(rows + (size_t)first * hidden, count, hidden, &head->norm, space);
        if (top) {
            for (int t = 0; t < count; t++) run_head(top, x + (size_t)t * hidden, hidden, space + block + (size_t)t * hidden);
            x = space + block;
        }
        for (int k = 0; k < head->num_labels; k++) {
            const float *w = head->classifier + (size_t)k * hidden;
            float *column = to + (size_t)first * head->num_labels + k;
            for (int t = 0; t < count; t++)
                column[(size_t)t * head->num_labels] = head->bias[k] + kernels->dot(x + (size_t)t * hidden, w, hidden);
        }
    }
    return 0;
}

/* Pool hidden states (tokens, hidden), normalized if there is a norm. space: (tokens, hidden), for normalizing. */
static void pool(const float *rows, int tokens, int hidden, const Norm *norm, Pooling pooling, float *space, float *to) {
    if (pooling == MEAN_TOKEN) kernels->mean(normed(rows, tokens, hidden, norm, space), tokens, hidden, to);
    else memcpy(to, normed(rows, 1, hidden, norm, space), (size_t)hidden * 4);
}

static int has_head(const Exits *e, int layer) { return layer == e->num_layers && e->head.dense; }

static Pooling pooling_of(const Exits *e, int layer) { return has_head(e, layer) ? e->head.pooling : e->pooling; }

/* True if an exit begins with the mean of the tokens as they are. */
static int takes_mean(const Exits *e, int layer) {
    return !e->at[layer].norm.scale && pooling_of(e, layer) == MEAN_TOKEN;
}

int run_exit(const Exits *e, int layer, const float *hidden_states, int tokens, const float *mean,
             const float *state_weights, float *logits, float *distances, float *term) {
    if (e->pooling == EVERY_TOKEN) return run_tokens(e, layer, hidden_states, tokens, logits);
    const Kernels *k = kernels;
    const ExitHead *head = &e->at[layer];
    int hidden = e->hidden, metric = head->metric;
    size_t states = ROUND_UP((size_t)hidden * 4, 64), space = ROUND_UP((size_t)metric * 4, 64);
    size_t quantized = ROUND_UP(quantized_size(1, hidden), 64), rows = head->norm.scale ? (size_t)tokens * hidden * 4 : 0;
    char *memory = scratch(2 * states + space + quantized + rows);
    if (memory == NULL) return -1;
    float *own = (float *)memory, *embedded = (float *)(memory + states);
    float *top = (float *)(memory + states + space);

    if (mean == NULL)
        pool(hidden_states, tokens, hidden, &head->norm, pooling_of(e, layer),
             (float *)(memory + 2 * states + space + quantized), own);
    const float *pooled = mean ? mean : own, *features = pooled; /* features: input of the classifier */
    if (state_weights) *term = k->dot(pooled, state_weights, hidden);
    if (has_head(e, layer)) {
        run_head(&e->head, pooled, hidden, top);
        features = top;
    }
    int is_finite = 1;
    for (int i = 0; i < head->num_labels; i++) {
        logits[i] = head->bias[i] + k->dot(features, head->classifier + (size_t)i * hidden, hidden);
        is_finite = is_finite && isfinite(logits[i]);
    }
    if (!metric) return 0;
    if (!is_finite) { /* quantization would turn NaN into a number */
        for (int i = 0; i < head->num_labels; i++) distances[i] = NAN;
        return 0;
    }
    if (k->begin) k->begin();
    multiply(&head->projection, pooled, 1, PLAIN, NULL, memory + 2 * states + space, embedded);
    if (k->end) k->end();
    float length = sqrtf(k->dot(embedded, embedded, metric));
    for (int i = 0; i < head->num_labels; i++) {
        float cosine = k->dot(embedded, head->prototypes + (size_t)i * metric, metric);
        distances[i] = 1.0f - (length == 0 ? 0.0f : cosine / length);
    }
    return 0;
}

static int is_asked(int layer, const Decision *d) {
    return d->exits->at[layer].is_set &&
           (d->ask_all || layer == d->deepest || (d->tau > 0.0 && may_exit(d->signal, layer)));
}

/* Index in Decision.logits of a layer's exit. */
static size_t logits_at(int layer, const Decision *d, int tokens) {
    size_t labels = d->exits->at[d->exits->num_layers].num_labels;
    return layer * labels * (d->exits->pooling == EVERY_TOKEN ? tokens : 1);
}

/* Read a computed exit, and decide whether the text exits there. */
static void decide_exit(int layer, Decision *d, int tokens) {
    const ExitHead *head = &d->exits->at[layer];
    size_t at = logits_at(layer, d, tokens);
    Reading *reading = &d->readings[d->num_readings++];
    if (d->exits->pooling == EVERY_TOKEN)
        *reading = read_tokens(layer, d->logits + at, d->counted, tokens, head->num_labels, d->outside);
    else
        *reading = read_exit(layer, d->logits + at, head->metric ? d->distances + at : NULL, d->thresholds,
                             head->num_labels);
    if (d->state_terms) reading->state_term = d->state_terms[layer];
    if (d->far && reading->nearest > d->far[layer] && !d->is_far) {
        d->is_far = 1;
        d->tau *= d->tau_factor;
    }
    reading->score = score(d->signal, d->readings, d->num_readings);
    d->is_below_tau = exits(reading->score, d->tau);
    if (d->is_below_tau && is_blocked(&d->flag, reading, d->logits + at, d->thresholds, head->num_labels))
        d->is_below_tau = 0, d->tau = 0.0;
    if (d->is_below_tau || layer == d->deepest) d->exit_layer = layer;
}

static __thread clockid_t clock_used = CLOCK_MONOTONIC;

static double now(void) {
    struct timespec t;
    clock_gettime(clock_used, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Run the embeddings or a layer for the consecutive texts in `rows`. */
static int run_texts(const Model *m, int layer, Pass *const *texts, const int *tokens, int count, float *rows) {
    if (layer) return run_layer(m, layer, rows, tokens, count, rows);
    for (int i = 0; i < count; rows += (size_t)tokens[i++] * m->hidden)
        if (run_embeddings(m, texts[i]->ids, texts[i]->types, tokens[i], rows)) return -1;
    return 0;
}

/* Keep the mean of a text's tokens after a layer, as an exit there would see it. The layer need not have an exit, so
 * the norm is the last exit's. */
static int keep_states(int layer, const float *rows, int tokens, Decision *d) {
    size_t hidden = d->exits->hidden;
    const Norm *norm = &d->exits->at[d->exits->num_layers].norm;
    float *space = norm->scale ? scratch(tokens * hidden * 4) : NULL;
    if (norm->scale && space == NULL) return -1;
    pool(rows, tokens, (int)hidden, norm, MEAN_TOKEN, space, d->states + layer * hidden);
    return 0;
}

/* Let every model that has not decided about a text do so after a layer; returns the number that are still undecided,
 * or -1 if memory runs out. mean: space for the mean of the tokens (hidden), which the exits share. end: the time at the
 * end of the layer, afterwards of the exits. */
static int decide(int layer, const float *rows, Pass *p, float *mean, double *end) {
    int undecided = 0, has_mean = 0;
    for (int i = 0; i < p->num_decisions; i++) {
        Decision *d = &p->decisions[i];
        if (d->exit_layer >= 0) continue;
        if (d->states && layer < d->num_states && keep_states(layer, rows, p->tokens, d)) return -1;
        if (is_asked(layer, d)) {
            size_t at = logits_at(layer, d, p->tokens);
            int shares = takes_mean(d->exits, layer);
            if (shares && !has_mean) kernels->mean(rows, p->tokens, d->exits->hidden, mean);
            has_mean |= shares;
            const float *weights = d->state_terms ? d->signal.state_weights + (size_t)layer * d->exits->hidden : NULL;
            if (run_exit(d->exits, layer, rows, p->tokens, shares ? mean : NULL, weights, d->logits + at,
                         d->distances + at, weights ? d->state_terms + layer : NULL))
                return -1;
            decide_exit(layer, d, p->tokens);
            double asked = now();
            p->seconds += asked - *end;
            *end = asked;
        }
        if (d->exit_layer < 0) undecided++;
        else d->seconds = p->seconds;
    }
    return undecided;
}

int run_passes(const Model *m, Pass *passes, int count, int first, int last) {
    size_t hidden = m->hidden, total = 0, row = 0;
    for (int i = 0; i < count; i++) total += passes[i].tokens;
    /* The rows, then space for the mean of a text's. */
    float *rows = aligned_alloc(64, ROUND_UP((total + 1) * hidden * 4, 64)), *mean = rows ? rows + total * hidden : NULL;
    Pass *texts[MAX_PASSES]; /* the texts that have not exited, and their numbers of tokens */
    int tokens[MAX_PASSES], failed = rows == NULL;
    for (int i = 0; i < count && !failed; i++) {
        Pass *p = texts[i] = &passes[i];
        tokens[i] = p->tokens;
        if (first) memcpy(rows + row * hidden, p->hidden, p->tokens * hidden * 4);
        row += p->tokens;
        for (Decision *d = p->decisions; d < p->decisions + p->num_decisions; d++)
            for (int layer = 0; layer < first; layer++)
                if (is_asked(layer, d)) decide_exit(layer, d, p->tokens);
    }
    for (int layer = first; layer <= last && count && !failed; layer++) {
        double start = now();
        failed = run_texts(m, layer, texts, tokens, count, rows);
        double end = now(), each = (end - start) / (double)row;
        int left = count;
        const float *from = rows;
        float *to = rows;
        for (int i = count = row = 0; i < left && !failed; i++) {
            Pass *p = texts[i];
            size_t size = p->tokens * hidden;
            p->seconds += each * p->tokens;
            int undecided = decide(layer, from, p, mean, &end);
            failed = undecided < 0;
            if (undecided > 0) { /* close the gaps that exited texts leave */
                if (to != from) memmove(to, from, size * 4);
                to += size;
                row += p->tokens;
                tokens[count] = p->tokens;
                texts[count++] = p;
            }
            from += size;
        }
    }
    const float *from = rows;
    for (int i = 0; i < count && !failed; i++, from += tokens[i - 1] * hidden)
        if (texts[i]->hidden) memcpy(texts[i]->hidden, from, tokens[i] * hidden * 4);
    free(rows);
    return failed ? -1 : 0;
}

/* Arguments and result of a call to run_passes_at_idle. A worker thread runs it: lowering a thread's priority needs no
 * privileges but raising it again does, so the calling thread keeps its priority and waits. */
typedef struct {
    const Model *m;
    Pass *passes;
    int count, first, last, failed;
} Call;

typedef struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Call *call; /* NULL: done */
    int ends;
} Worker;

static pthread_key_t worker_key;
static pthread_once_t worker_once = PTHREAD_ONCE_INIT;

static void *work(void *argument) {
    Worker *w = argument;
#ifdef SCHED_IDLE
    sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0});
#endif
    clock_used = CLOCK_THREAD_CPUTIME_ID; /* excludes time while preempted */
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->call == NULL && !w->ends) pthread_cond_wait(&w->changed, &w->lock);
        if (w->ends) break;
        Call *c = w->call;
        pthread_mutex_unlock(&w->lock);
        c->failed = run_passes(c->m, c->passes, c->count, c->first, c->last);
        pthread_mutex_lock(&w->lock);
        w->call = NULL;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Called when the thread that owns the worker ends. */
static void end_worker(void *argument) {
    Worker *w = argument;
    pthread_mutex_lock(&w->lock);
    w->ends = 1;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

static void make_worker_key(void) { pthread_key_create(&worker_key, end_worker); }

/* The worker of the calling thread, created by its first call; NULL if it cannot be created. */
static Worker *own_worker(void) {
    pthread_once(&worker_once, make_worker_key);
    Worker *w = pthread_getspecific(worker_key);
    if (w != NULL) return w;
    w = calloc(1, sizeof(Worker));
    if (w == NULL) return NULL;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    if (pthread_create(&w->thread, NULL, work, w)) {
        free(w);
        return NULL;
    }
    if (pthread_setspecific(worker_key, w)) {
        end_worker(w);
        return NULL;
    }
    return w;
}

int run_passes_at_idle(const Model *m, Pass *passes, int count, int first, int last) {
    Worker *w = own_worker();
    if (w == NULL) return run_passes(m, passes, count, first, last);
    Call call = {m, passes, count, first, last, 0};
    pthread_mutex_lock(&w->lock);
    w->call = &call;
    pthread_cond_broadcast(&w->changed);
    while (w->call != NULL) pthread_cond_wait(&w->changed, &w->lock);
    pthread_mutex_unlock(&w->lock);
    return call.failed;
}
