#include "attention.h"

#include <math.h>

#include "kernels.h"

/* KEYS: keys in a tile, few enough to stay in the L2 cache with their values. KEYS_WITH_TERMS: fewer, because the terms
 * of the tile's keys must stay there, too. NEAR_QUERIES: with a window, queries that use the tiles together. */
enum { KEYS = 512, KEYS_WITH_TERMS = 128, NEAR_QUERIES = 256 };

static int at_least(int a, int b) { return a > b ? a : b; }
static int at_most(int a, int b) { return a < b ? a : b; }
/* The row of the tables for key − query = distance. */
static int row_of(const Terms *t, int distance) { return t->buckets[t->positions - 1 + distance]; }

static int has_terms(const Attention *a) { return a->terms.buckets != NULL; }
static int keys_of_tile(const Attention *a, int tokens) { return at_most(tokens, has_terms(a) ? KEYS_WITH_TERMS : KEYS); }

/* Rows of the tables for the distances of a text, rounded up to an odd number of cache lines: the terms of a tile's keys
 * are read diagonally, and would otherwise compete for the same part of the L1 cache. */
static int rows_of_terms(const Attention *a, int tokens) {
    return has_terms(a) ? ROUND_UP(row_of(&a->terms, 1 - tokens) - row_of(&a->terms, tokens - 1) + 1, 32) + 16 : 0;
}

/* Parts of the buffer `work`. */
typedef struct {
    float *tile, *scores, *largest, *total; /* largest, total: (tokens) */
    float *tables[2], *rounded[2];          /* tables of keys and of queries, prepared; their rows in bfloat16 */
    float *ours, *theirs; /* the terms of a block's queries (ATTENTION_ROWS, rows), and of a tile's keys (keys, rows) */
} Work;

/* Set the parts of `work`, if it is not NULL; returns the number of floats that it needs. */
static size_t plan(const Attention *a, int width, int tokens, float *work, Work *w) {
    int wide = ROUND_UP(keys_of_tile(a, tokens), 16), rows = rows_of_terms(a, tokens);
    size_t table = (size_t)width * rows;
    struct {
        float **at;
        size_t count;
    } parts[] = {{&w->tile, tile_work(width, wide, 1)}, {&w->scores, (size_t)ATTENTION_ROWS * wide},
                 {&w->largest, tokens},                 {&w->total, tokens},
                 {&w->tables[0], table},                {&w->tables[1], table},
                 {&w->rounded[0], table},               {&w->rounded[1], table},
                 {&w->ours, (size_t)ATTENTION_ROWS * rows}, {&w->theirs, (size_t)wide * rows}};
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].at = work ? work + total : NULL;
        total += ROUND_UP(parts[i].count, 16);
        if (work) ASAN_POISON_MEMORY_REGION(work + total, GAP);
        total += GAP / 4;
    }
    return total;
}

size_t attention_work(const Attention *a, int width, int tokens) {
    Work w;
    return plan(a, width, tokens, NULL, &w);
}

/* A head of a text, with its queries, keys and values. */
typedef struct {
    const Attention *a;
    const Work *work;
    const float *q, *k, *v; /* (tokens, stride) */
    size_t stride;
    int head, tokens, width, pairs, rounds, rows; /* rows: largest number of queries in a block */
    int first_row, num_rows; /* the rows of the tables that the text needs */
    Tile tables[2];
    float *to; /* (tokens, hidden) */
    int hidden;
} Text;

/* The scores of `count` rows, queries or keys, with a table's rows for key − query = least … most. They are written to
 * `to` (count, stride): from column 0 on if is_packed, otherwise each to the column of its table row. Returns the first
 * table row, counted from first_row and rounded down to a multiple of 16. */
static int score_table(const Text *h, const Tile *table, const float *rows, int count, int least, int most, float *to,
                       size_t stride, int is_packed) {
    const Terms *t = &h->a->terms;
    Block b = {.tile = table, .rows = count, .factor = 1.0f, .score_stride = stride};
    b.first = (row_of(t, most) - h->first_row) / 16 * 16;
    b.last = row_of(t, least) - h->first_row + 1;
    b.scores = to + (is_packed ? 0 : b.first);
    for (int r = 0; r < count; r++) b.q[r] = rows + r * h->stride;
    kernels->score(&b);
    return b.first;
}

/* The terms of a tile's keys for all queries. */
static void score_keys(const Text *h, const Tile *tile, int key) {
    int stride = rows_of_terms(h->a, h->tokens);
    for (int i = 0; i < tile->tokens; i += h->rows) {
        int count = at_most(h->rows, tile->tokens - i);
        score_table(h, &h->tables[1], tile->k + i * h->stride, count, key + i - (h->tokens - 1), key + i + count - 1,
                    h->work->theirs + (size_t)i * stride, stride, 0);
    }
}

/* Add the terms to the scores of a block of queries, from query t on. key: number of the tile's first key. */
static void add_block_terms(const Text *h, const Block *b, int t, int key) {
    const Terms *terms = &h->a->terms;
    int stride = rows_of_terms(h->a, h->tokens), from = key + b->first, count = b->last - b->first, first = 0;
    if (terms->keys)
        first = score_table(h, &h->tables[0], b->q[0], b->rows, from - (t + b->rows - 1), from + count - 1 - t,
                            h->work->ours, stride, 1);
    for (int r = 0; r < b->rows; r++) {
        const int32_t *rows = terms->buckets + terms->positions - 1 + from - (t + r);
        const float *ours = terms->keys ? h->work->ours + (size_t)r * stride - h->first_row - first : NULL;
        const float *theirs = terms->queries ? h->work->theirs + (size_t)b->first * stride - h->first_row : NULL;
        kernels->add_terms(b->scores + r * b->score_stride, count, rows, ours, theirs, stride);
    }
}

/* Offsets of a query's scores, from key `from` on; NULL: none. */
static const float *offsets_of(const Offsets *o, int head, int query, int from) {
    return o->values ? o->values + head * offsets_stride(o->positions) + o->positions - 1 - query + from : NULL;
}

/* Attention of `count` queries, from query t on, to a tile whose first key is `key`. is_only: the only tile. */
static void attend_block(const Text *h, const Tile *tile, int t, int count, int key, int is_only) {
    const Attention *a = h->a;
    int window = a->window ? a->window : h->tokens, end = key + tile->tokens;
    int first = at_least(key, t - window), last = at_most(end, t + count + window);
    if (first >= last) return;
    Block b; /* not initialized: that would take longer than a short text's scores */
    b.tile = tile;
    b.rows = count;
    b.first = (first - key) / 16 * 16;
    b.last = last - key;
    b.factor = a->scale;
    b.scores = h->work->scores;
    b.score_stride = ROUND_UP(tile->tokens, 16);
    b.largest = is_only ? NULL : h->work->largest + t;
    b.total = is_only ? NULL : h->work->total + t;
    int from = key + b.first;
    for (int r = 0; r < count; r++) {
        b.q[r] = h->q + (t + r) * h->stride;
        b.to[r] = h->to + (size_t)(t + r) * h->hidden;
        b.low[r] = at_least(0, t + r - window - from);
        b.high[r] = at_most(last - from, t + r + window + 1 - from);
        b.added[r] = offsets_of(&a->offsets, h->head, t + r, from);
    }
    kernels->score(&b);
    if (has_terms(a)) add_block_terms(h, &b, t, key);
    kernels->mix(&b);
}

/* Attention of the queries first … last − 1. */
static void attend_queries(const Text *h, int first, int last) {
    const Attention *a = h->a;
    int from = a->window ? at_least(0, first - a->window) : 0;
    int to = a->window ? at_most(h->tokens, last + a->window) : h->tokens;
    int most = keys_of_tile(a, h->tokens), tiles = (to - from + most - 1) / most;
    int each = at_most(most, ROUND_UP((to - from + tiles - 1) / tiles, 16));
    int blocks = (last - first + h->rows - 1) / h->rows, is_only = each >= to - from;
    for (int t = first; t < last && !is_only; t++) {
        h->work->largest[t] = -INFINITY;
        h->work->total[t] = 0.0f;
        for (int i = 0; i < h->width; i++) h->to[(size_t)t * h->hidden + i] = 0.0f;
    }
    for (int key = from; key < to; key += each) {
        Tile tile = {.k = h->k + key * h->stride, .v = h->v + key * h->stride, .stride = h->stride,
                     .tokens = at_most(each, to - key), .width = h->width, .pairs = h->pairs, .rounds = h->rounds,
                     .work = h->work->tile};
        kernels->prepare(&tile);
        if (a->terms.queries) score_keys(h, &tile, key);
        for (int n = 0; n < blocks; n++) {
            int t = first + (last - first) * n / blocks, end = first + (last - first) * (n + 1) / blocks;
            attend_block(h, &tile, t, end - t, key, is_only);
        }
    }
    for (int t = first; t < last && !is_only; t++) {
        float inverse = 1.0f / h->work->total[t];
        for (int i = 0; i < h->width; i++) h->to[(size_t)t * h->hidden + i] *= inverse;
    }
}

/* Prepare the rows of a head's tables that the text needs. */
static void prepare_tables(Text *h) {
    const Terms *terms = &h->a->terms;
    h->first_row = row_of(terms, h->tokens - 1);
    h->num_rows = row_of(terms, 1 - h->tokens) - h->first_row + 1;
    size_t count = (size_t)h->num_rows * h->width;
    const float *tables[] = {terms->keys, terms->queries};
    for (int i = 0; i < 2; i++) {
        if (tables[i] == NULL) continue;
        const float *rows = tables[i] + ((size_t)h->head * terms->rows + h->first_row) * h->width;
        if (h->rounds && !h->pairs) {
            rows = memcpy(h->work->rounded[i], rows, count * 4);
            round_to_bfloat16(h->work->rounded[i], count);
        }
        h->tables[i] = (Tile){.k = rows, .stride = h->width, .tokens = h->num_rows, .width = h->width,
                              .pairs = h->pairs, .rounds = h->rounds, .work = h->work->tables[i]};
        kernels->prepare(&h->tables[i]);
    }
}

void attend(const Attention *a, float *qkv, int tokens, int hidden, float *work, float *to) {
    const Kernels *k = kernels;
    int width = hidden / a->num_heads, rounds = tokens >= LONG;
    Work parts;
    size_t used = plan(a, width, tokens, work, &parts);
    Text h = {.a = a, .work = &parts, .stride = 3 * (size_t)hidden, .tokens = tokens, .width = width, .hidden = hidden,
               .rounds = rounds, .pairs = rounds && k->has_pairs && k->has_pairs(width)};
    h.rows = h.pairs ? k->paired_rows : k->rows;
    if (a->rotation) k->rotate(qkv, tokens, h.stride, 2 * a->num_heads, width, a->rotation->cos, a->rotation->sin);
    if (rounds && !h.pairs) round_to_bfloat16(qkv, tokens * h.stride);
    int most = a->window ? at_most(tokens, NEAR_QUERIES) : tokens, parts_of_text = (tokens + most - 1) / most;
    for (h.head = 0; h.head < a->num_heads; h.head++) {
        h.q = qkv + h.head * width;
        h.k = h.q + hidden;
        h.v = h.k + hidden;
        h.to = to + h.head * width;
        if (has_terms(a)) prepare_tables(&h);
        for (int i = 0; i < parts_of_text; i++)
            attend_queries(&h, (int)((long)tokens * i / parts_of_text), (int)((long)tokens * (i + 1) / parts_of_text));
    }
    ASAN_UNPOISON_MEMORY_REGION(work, used * 4); /* the next text has other parts */
}
