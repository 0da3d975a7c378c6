/* The extension module de3.native.kernels: checks arguments, holds buffers, and releases the GIL while layers run.
 * native/kernels.pyi has the types of its functions. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000 /* one build for Python 3.11 and all later versions */
#include <Python.h>

#include "kernels.h"
#include "layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CAPSULE "native.Model"
#define EXITS "native.Exits"
#define MAX_TOKENS (1 << 16)

/* False if the reference is in use, unless a test chose it. */
static int is_fast;

static void destroy(PyObject *capsule) { free_model(PyCapsule_GetPointer(capsule, CAPSULE)); }

static Model *model_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, CAPSULE); }

static void destroy_exits(PyObject *capsule) { free_exits(PyCapsule_GetPointer(capsule, EXITS)); }

static Exits *exits_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, EXITS); }

/* Returns the condition; if it is false, sets an error unless an error is already set. */
static int require(int condition, const char *message) {
    if (!condition && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, message);
    return condition;
}

static int require_memory(int condition) {
    if (!condition) PyErr_NoMemory();
    return condition;
}

/* True if a buffer holds exactly `count` elements of `size` bytes; otherwise sets an error. */
static int holds(const Py_buffer *buffer, size_t count, size_t size, const char *name) {
    if ((size_t)buffer->len == count * size) return 1;
    PyErr_Format(PyExc_ValueError, "%s: has %zd bytes, expected %zu", name, buffer->len, count * size);
    return 0;
}

static int in_range(int num_layers, int layer, int first) {
    if (layer >= first && layer <= num_layers) return 1;
    PyErr_Format(PyExc_ValueError, "layer %d is not one of %d to %d", layer, first, num_layers);
    return 0;
}

/* Release buffers; returns None if ok, otherwise NULL, with the error that is set. */
static PyObject *done(int ok, Py_buffer *buffers, int count) {
    for (int i = 0; i < count; i++) PyBuffer_Release(&buffers[i]);
    if (!ok) return NULL;
    Py_RETURN_NONE;
}

/* ---- implementations -------------------------------------------------------------------------------- */

static void use_best(void) {
    choose_kernels();
    is_fast = kernels != all_kernels[num_kernels - 1];
}

static PyObject *py_implementations(PyObject *self, PyObject *none) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < num_kernels; i++) {
        if (all_kernels[i]->why_not() != NULL) continue;
        PyObject *name = PyUnicode_FromString(all_kernels[i]->name);
        if (name == NULL || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_supported(PyObject *self, PyObject *none) {
    return PyUnicode_FromString(is_fast ? kernels->name : "");
}

static PyObject *py_why_not(PyObject *self, PyObject *none) {
    PyObject *text = PyUnicode_FromString("");
    for (int i = 0; !is_fast && text != NULL && i < num_kernels - 1; i++) {
        const Kernels *k = all_kernels[i];
        PyObject *longer = PyUnicode_FromFormat("%U%s%s: %s", text, i ? "; " : "", k->name, k->why_not());
        Py_DECREF(text);
        text = longer;
    }
    return text;
}

static PyObject *py_use(PyObject *self, PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    if (*name == '\0') {
        use_best();
        Py_RETURN_NONE;
    }
    for (int i = 0; i < num_kernels; i++)
        if (strcmp(all_kernels[i]->name, name) == 0 && all_kernels[i]->why_not() == NULL) {
            kernels = all_kernels[i];
            is_fast = 1;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this machine cannot run %s", name);
}

static PyObject *py_peak(PyObject *self, PyObject *none) {
    const Kernels *k = kernels;
    struct timespec a, b;
    double count = 0, seconds;
    Py_BEGIN_ALLOW_THREADS;
    if (k->begin) k->begin();
    clock_gettime(CLOCK_MONOTONIC, &a);
    do {
        count += k->multiply_adds();
        clock_gettime(CLOCK_MONOTONIC, &b);
        seconds = b.tv_sec - a.tv_sec + 1e-9 * (b.tv_nsec - a.tv_nsec);
    } while (seconds < 0.2);
    if (k->end) k->end();
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(count / seconds);
}

/* ---- building a model ------------------------------------------------------------------------------- */

/* new(hidden, num_heads, inner, num_layers, num_words, gelu, gate, fd=-1, is_filled=False) */
static PyObject *py_new(PyObject *self, PyObject *args) {
    Sizes s;
    int gelu, fd = -1, is_filled = 0;
    if (!PyArg_ParseTuple(args, "iiiiipp|ip", &s.hidden, &s.num_heads, &s.inner, &s.num_layers, &s.num_words, &gelu,
                          &s.has_gate, &fd, &is_filled))
        return NULL;
    if (!require(has_kernels(&s) && s.num_words >= 0 && s.num_words <= 1 << 30 && (fd >= 0 || !is_filled),
                 "there are no kernels for these sizes"))
        return NULL;
    Model *m = new_model(&s, fd, is_filled);
    if (m == NULL) return PyErr_NoMemory();
    m->has_gelu = gelu;
    PyObject *capsule = PyCapsule_New(m, CAPSULE, destroy);
    if (capsule == NULL) free_model(m);
    return capsule;
}

/* new_exits(hidden, num_layers, pooling): the exits of a model whose last exit is after layer num_layers. pooling: 0 the
 * first token, 1 the mean of the tokens, 2 each token */
static PyObject *py_new_exits(PyObject *self, PyObject *args) {
    int hidden, num_layers, pooling;
    if (!PyArg_ParseTuple(args, "iii", &hidden, &num_layers, &pooling)) return NULL;
    if (!require(hidden >= 64 && hidden % 64 == 0 && hidden <= 8192 && num_layers >= 1 && num_layers <= MAX_LAYERS &&
                     pooling >= 0 && pooling < NUM_POOLINGS,
                 "there are no kernels for these sizes"))
        return NULL;
    Exits *e = calloc(1, sizeof(Exits));
    if (e == NULL) return PyErr_NoMemory();
    *e = (Exits){.hidden = hidden, .num_layers = num_layers, .pooling = pooling};
    PyObject *capsule = PyCapsule_New(e, EXITS, destroy_exits);
    if (capsule == NULL) free_exits(e);
    return capsule;
}

/* seal(model, fd): the model must be complete; see seal_model */
static PyObject *py_seal(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int fd, failed;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &fd)) return NULL;
    Model *m = model_of(capsule);
    if (m == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS; /* collecting 300 MB into huge pages takes seconds on a busy machine */
    failed = seal_model(m, fd);
    Py_END_ALLOW_THREADS;
    if (failed) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* set_linear(model, layer, which, weight (in, out) int8, scale (out), bias (out)) */
static PyObject *py_set_linear(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, which;
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "Oiiy*y*y*", &capsule, &number, &which, &b[0], &b[1], &b[2])) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m->num_layers, number, 1) &&
             require(which >= 0 && which < NUM_LINEARS && (which != GATE_LINEAR || m->has_gate),
                     "which must be 0 (qkv), 1 (out), 2 (up), 3 (gate, if there are gates) or 4 (down)");
    if (ok) {
        Place place = place_of(m, number, which);
        int in = place.in, out = place.out;
        Linear packed = {0}; /* rejected weights leave the previous ones in place */
        ok = holds(&b[0], (size_t)in * out, 1, "weight") && holds(&b[1], out, 4, "scale") &&
             holds(&b[2], out, 4, "bias") &&
             require_memory(!pack_linear(&packed, in, out, b[0].buf, b[1].buf, b[2].buf, place.tiles, end_of_tiles(m),
                                         m->is_filled));
        free_linear(ok ? place.linear : &packed);
        if (ok) *place.linear = packed;
    }
    return done(ok, b, 3);
}

/* Copy a norm's scale and shift of `hidden` elements into it; returns false, with an error set, if they are invalid. */
static int copy_norm(Norm *norm, int hidden, const Py_buffer *scale, const Py_buffer *shift, float epsilon) {
    if (!holds(scale, hidden, 4, "scale") || !holds(shift, hidden, 4, "shift")) return 0;
    free_norm(norm);
    *norm = (Norm){copy_of(scale->buf, scale->len), copy_of(shift->buf, shift->len), epsilon};
    return require_memory(norm->scale && norm->shift);
}

/* set_norm(model, layer, which, scale, shift, epsilon). which: 0 before and 1 after attention, 2 before and 3 after the
 * feed-forward network (layer 0: of the embeddings) */
static PyObject *py_set_norm(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, which;
    float epsilon;
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "Oiiy*y*f", &capsule, &number, &which, &b[0], &b[1], &epsilon)) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m->num_layers, number, 0) &&
             require(which >= 0 && which <= 3 && (number || which == 3), "there is no such norm");
    if (ok) {
        Layer *l = &m->layers[number];
        Norm *norms[] = {&l->before_attention, &l->after_attention, &l->before_ffn, number ? &l->after_ffn : &m->norm};
        ok = copy_norm(norms[which], m->hidden, &b[0], &b[1], epsilon);
    }
    return done(ok, b, 2);
}

/* set_exit_norm(exits, layer, scale, shift, epsilon, is_of_head): the norm before an exit's pooling; is_of_head: before
 * the last classifier, after the head's dense layer */
static PyObject *py_set_exit_norm(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, is_of_head;
    float epsilon;
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "Oiy*y*fp", &capsule, &number, &b[0], &b[1], &epsilon, &is_of_head)) return NULL;
    Exits *e = exits_of(capsule);
    int ok = e != NULL && in_range(e->num_layers, number, 0) &&
             copy_norm(is_of_head ? &e->head.norm : &e->at[number].norm, e->hidden, &b[0], &b[1], epsilon);
    return done(ok, b, 2);
}

/* set_offsets(model, layer, values (heads, 2·P − 1)): offsets of attention scores for key − query = 1 − P … P − 1 */
static PyObject *py_set_offsets(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number;
    Py_buffer b;
    if (!PyArg_ParseTuple(args, "Oiy*", &capsule, &number, &b)) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m->num_layers, number, 1);
    if (ok) {
        Offsets *offsets = &m->layers[number].attention.offsets;
        size_t width = b.len / 4 / m->num_heads;
        ok = holds(&b, width * m->num_heads, 4, "values") &&
             require(width % 2 == 1 && width <= 2 * MAX_TOKENS && !offsets->values,
                     "the offsets are already set, or are not of 2·P − 1 distances");
        if (ok) {
            *offsets = (Offsets){(int)(width + 1) / 2, calloc(m->num_heads * offsets_stride((int)(width + 1) / 2), 4)};
            ok = require_memory(offsets->values != NULL);
            for (int head = 0; ok && head < m->num_heads; head++)
                memcpy(offsets->values + head * offsets_stride(offsets->positions),
                       (const float *)b.buf + head * width, width * 4);
        }
    }
    return done(ok, &b, 1);
}

/* set_window(model, layer, window): the largest distance between a token and its keys */
static PyObject *py_set_window(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, window;
    if (!PyArg_ParseTuple(args, "Oii", &capsule, &number, &window)) return NULL;
    Model *m = model_of(capsule);
    if (m == NULL || !in_range(m->num_layers, number, 1)) return NULL;
    if (!require(window >= 1 && window <= MAX_TOKENS, "a window must be 1 to 65536")) return NULL;
    m->layers[number].attention.window = window;
    Py_RETURN_NONE;
}

/* set_rotation(model, layers, cos (P, width / 2), sin): rotary positions of these layers */
static PyObject *py_set_rotation(PyObject *self, PyObject *args) {
    PyObject *capsule, *numbers;
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "OO!y*y*", &capsule, &PyList_Type, &numbers, &b[0], &b[1])) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL, free_place = 0;
    if (ok) {
        size_t half = m->hidden / m->num_heads / 2, positions = b[0].len / 4 / half;
        while (free_place < MAX_ROTATIONS && m->rotations[free_place].cos) free_place++;
        ok = holds(&b[0], positions * half, 4, "cos") && holds(&b[1], positions * half, 4, "sin") &&
             require(positions <= MAX_TOKENS && free_place < MAX_ROTATIONS, "too many positions or rotations");
        if (ok) {
            Rotation *rotation = &m->rotations[free_place];
            *rotation = (Rotation){(int)positions, copy_of(b[0].buf, b[0].len), copy_of(b[1].buf, b[1].len)};
            ok = require_memory(rotation->cos && rotation->sin);
            for (Py_ssize_t i = 0; ok && i < PyList_Size(numbers); i++) {
                long number = PyLong_AsLong(PyList_GetItem(numbers, i));
                ok = !PyErr_Occurred() && require(number >= 1 && number <= m->num_layers, "there is no such layer");
                if (ok) m->layers[number].attention.rotation = rotation;
            }
        }
    }
    return done(ok, b, 2);
}

/* set_terms(model, layer, scale, buckets int32 (2·P − 1), keys (heads, R, width) or empty, queries): terms of attention
 * scores, see Terms. scale: factor of Q·Kᵀ; the tables contain it already */
static PyObject *py_set_terms(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number;
    float scale;
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "Oify*y*y*", &capsule, &number, &scale, &b[0], &b[1], &b[2])) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m->num_layers, number, 1);
    if (ok) {
        Attention *a = &m->layers[number].attention;
        size_t count = b[0].len / 4, rows = (b[1].len ? b[1].len : b[2].len) / 4 / m->hidden;
        ok = holds(&b[0], count, 4, "buckets") && (!b[1].len || holds(&b[1], rows * m->hidden, 4, "keys")) &&
             (!b[2].len || holds(&b[2], rows * m->hidden, 4, "queries")) &&
             require(count % 2 == 1 && count <= 2 * MAX_TOKENS && rows >= 1 && rows <= 1 << 16 && !a->terms.buckets,
                     "the terms are already set, have no tables, or buckets that are not of 2·P − 1 distances");
        const int32_t *buckets = b[0].buf;
        for (size_t i = 0; ok && i < count; i++)
            ok = require(buckets[i] >= 0 && buckets[i] < (int)rows && (i == 0 || buckets[i] <= buckets[i - 1]),
                         "buckets must descend, and be rows of the tables");
        if (ok) {
            a->scale = scale;
            a->terms = (Terms){(int)(count + 1) / 2, (int)rows, copy_of(b[0].buf, b[0].len),
                               b[1].len ? copy_of(b[1].buf, b[1].len) : NULL, b[2].len ? copy_of(b[2].buf, b[2].len) : NULL};
            ok = require_memory(a->terms.buckets && (a->terms.keys || !b[1].len) && (a->terms.queries || !b[2].len));
        }
    }
    return done(ok, b, 3);
}

/* set_embeddings(model, words (V, H) int8, scales (V), positions (P, H) or empty, types (T, H) or empty) */
static PyObject *py_set_embeddings(PyObject *self, PyObject *args) {
    PyObject *capsule;
    Py_buffer b[4];
    if (!PyArg_ParseTuple(args, "Oy*y*y*y*", &capsule, &b[0], &b[1], &b[2], &b[3])) return NULL;
    Model *m = model_of(capsule);
    int ok = m != NULL;
    if (ok) {
        size_t words = b[1].len / 4, positions = b[2].len / 4 / m->hidden, types = b[3].len / 4 / m->hidden;
        ok = holds(&b[0], words * m->hidden, 1, "words") && holds(&b[1], words, 4, "scales") &&
             holds(&b[2], positions * m->hidden, 4, "positions") && holds(&b[3], types * m->hidden, 4, "types") &&
             require(!m->word_scales && words == (size_t)m->num_words && positions <= 1 << 30 && types <= 1 << 30,
                     "the embeddings are already set, have another number of words, or are too large");
        if (ok) {
            if (!m->is_filled) memcpy(m->words, b[0].buf, b[0].len);
            m->word_scales = copy_of(b[1].buf, b[1].len);
            m->positions = copy_of(b[2].buf, b[2].len);
            m->types = copy_of(b[3].buf, b[3].len);
            m->num_positions = (int)positions;
            m->num_types = (int)types;
            ok = require_memory(m->word_scales && m->positions && m->types);
        }
    }
    return done(ok, b, 4);
}

/* set_exit(exits, layer, classifier (K, H), bias (K), weight (H, D) int8, scale (D), metric_bias (D), prototypes (K, D));
 * the last four are empty for an exit without prototypes */
static PyObject *py_set_exit(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number;
    Py_buffer b[6];
    if (!PyArg_ParseTuple(args, "Oiy*y*y*y*y*y*", &capsule, &number, &b[0], &b[1], &b[2], &b[3], &b[4], &b[5])) return NULL;
    Exits *e = exits_of(capsule);
    int ok = e != NULL && in_range(e->num_layers, number, 0);
    if (ok) {
        ExitHead *head = &e->at[number];
        int labels = (int)(b[1].len / 4), metric = (int)(b[3].len / 4);
        ok = holds(&b[0], (size_t)labels * e->hidden, 4, "classifier") && holds(&b[1], labels, 4, "bias") &&
             holds(&b[2], (size_t)metric * e->hidden, 1, "weight") && holds(&b[3], metric, 4, "scale") &&
             holds(&b[4], metric, 4, "metric_bias") && holds(&b[5], (size_t)labels * metric, 4, "prototypes") && require(!head->is_set, "this exit is already set") &&
             require(metric % 32 == 0, "a metric space must have a multiple of 32 dimensions");
        for (int i = 0; ok && i <= e->num_layers; i++)
            ok = require(labels >= 1 && (e->pooling != EVERY_TOKEN || (labels > 1 && !metric)) && (!e->at[i].is_set || e->at[i].num_labels == labels),
                         "exits must have the same labels, 1 or more; for each token 2 or more, and no metric space");
        ok = ok && require(labels > 1 || !metric, "a regression model has no metric space");
        if (ok) {
            *head = (ExitHead){.num_labels = labels, .metric = metric, .norm = head->norm};
            head->classifier = copy_of(b[0].buf, b[0].len);
            head->bias = copy_of(b[1].buf, b[1].len);
            head->prototypes = copy_of(b[5].buf, b[5].len);
            if (metric) head->tiles = aligned_alloc(64, (size_t)e->hidden * metric);
            ok = require_memory(head->classifier && head->bias && head->prototypes && !(metric && !head->tiles)) &&
                 require_memory(!metric ||
                                !pack_linear(&head->projection, e->hidden, metric, b[2].buf, b[3].buf, b[4].buf,
                                             head->tiles, head->tiles + (size_t)e->hidden * metric, 0));
            head->is_set = ok;
        }
    }
    return done(ok, b, 6);
}

/* set_head(exits, dense (H, H), bias (H), activation, pooling): the head of the last exit, which has no prototypes */
static PyObject *py_set_head(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int activation, pooling;
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "Oy*y*ii", &capsule, &b[0], &b[1], &activation, &pooling)) return NULL;
    Exits *e = exits_of(capsule);
    int ok = e != NULL && holds(&b[0], (size_t)e->hidden * e->hidden, 4, "dense") &&
             holds(&b[1], e->hidden, 4, "bias") &&
             require(activation >= 0 && activation < NUM_HEAD_ACTIVATIONS, "there is no such activation") &&
             require(pooling >= 0 && pooling < NUM_POOLINGS && (pooling == EVERY_TOKEN) == (e->pooling == EVERY_TOKEN),
                     "there is no such pooling") &&
             require(!e->head.dense && !e->at[e->num_layers].metric,
                     "the head is already set, or the last exit has prototypes");
    if (ok) {
        float *dense = copy_of(b[0].buf, b[0].len), *bias = copy_of(b[1].buf, b[1].len);
        e->head = (Head){dense, bias, activation, pooling, e->head.norm};
        ok = require_memory(dense && bias);
    }
    return done(ok, b, 2);
}

/* ---- running ---------------------------------------------------------------------------------------- */

/* run(model, layer, from, types, to): the embeddings, or a layer. from: ids int64 (T) for layer 0, otherwise hidden
 * states (T, H). types: int64 (T) for layer 0 of a model with token types, otherwise None. to: hidden states (T, H). */
static PyObject *py_run(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, failed = 0;
    Py_buffer b[3] = {0};
    Py_buffer *from = &b[0], *types = &b[1], *to = &b[2];
    if (!PyArg_ParseTuple(args, "Oiy*z*w*", &capsule, &number, from, types, to)) return NULL;
    const Model *m = model_of(capsule);
    int ok = m != NULL && in_range(m->num_layers, number, 0);
    size_t tokens = ok ? (size_t)to->len / 4 / m->hidden : 0;
    ok = ok && holds(to, tokens * m->hidden, 4, "to") &&
         (number ? holds(from, tokens * m->hidden, 4, "from") : holds(from, tokens, 8, "ids")) &&
         (number || !m->num_types || holds(types, tokens, 8, "types")) &&
         require(tokens >= 1 && tokens <= MAX_TOKENS && is_complete(m, number),
                 "no tokens, too many, or a layer that is not complete");
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        int count = (int)tokens;
        failed = number ? run_layer(m, number, from->buf, &count, 1, to->buf)
                        : run_embeddings(m, from->buf, types->buf, count, to->buf);
        Py_END_ALLOW_THREADS;
        ok = require(!failed, "an id outside the tables, or out of memory");
    }
    return done(ok, b, 3);
}

/* run_exit(exits, layer, hidden (T, H), logits (K), distances (K), state_weights=None (H)) → the product of
 * state_weights with the pooled state, or 0; distances may be None without a metric space. With exits for each token,
 * logits is (T, K). */
static PyObject *py_run_exit(PyObject *self, PyObject *args) {
    PyObject *capsule;
    int number, failed = 0;
    float term = 0.0f;
    Py_buffer b[4] = {0};
    Py_buffer *from = &b[0], *logits = &b[1], *distances = &b[2], *weights = &b[3];
    if (!PyArg_ParseTuple(args, "Oiy*w*z*|z*", &capsule, &number, from, logits, distances, weights)) return NULL;
    const Exits *e = exits_of(capsule);
    int ok = e != NULL && in_range(e->num_layers, number, 0) &&
             require(e->at[number].is_set, "this layer has no exit");
    if (ok) {
        const ExitHead *head = &e->at[number];
        size_t tokens = (size_t)from->len / 4 / e->hidden, labels = head->num_labels;
        ok = holds(from, tokens * e->hidden, 4, "hidden") &&
             holds(logits, labels * (e->pooling == EVERY_TOKEN ? tokens : 1), 4, "logits") &&
             require(tokens >= 1 && tokens <= MAX_TOKENS, "no tokens, or too many") &&
             require(head->metric || !distances->buf, "this layer has no metric space, so no distances") &&
             require(!head->metric || (distances->buf && !distances->readonly), "distances is missing or read-only") &&
             (!head->metric || holds(distances, labels, 4, "distances")) &&
             (!weights->buf || (holds(weights, e->hidden, 4, "state_weights") &&
                                require(e->pooling != EVERY_TOKEN, "exits for each token have no pooled state")));
        if (ok) {
            Py_BEGIN_ALLOW_THREADS;
            failed = run_exit(e, number, from->buf, (int)tokens, NULL, weights->buf, logits->buf, distances->buf, &term);
            Py_END_ALLOW_THREADS;
            ok = require(!failed, "out of memory");
        }
    }
    for (int i = 0; i < 4; i++) PyBuffer_Release(&b[i]);
    return ok ? PyFloat_FromDouble(term) : NULL;
}

/* Set the weights of a signal; true if it is known and its weights, if any, are for `layers` layers. Otherwise sets an
 * error. */
static int has_signal(Signal *signal, const Py_buffer *weights, int layers) {
    signal->weights = weights->buf;
    return require(signal->code >= 0 && signal->code < NUM_SIGNALS, "there is no such signal") &&
           (signal->code != RISK || holds(weights, (size_t)layers * RISK_FEATURES, 8, "weights"));
}

/* Set a flag; true if its labels exist, and each has a threshold. Otherwise sets an error. */
static int has_flag(Flag *flag, const Py_buffer *chosen, const Py_buffer *thresholds, int labels) {
    flag->labels = chosen->buf;
    flag->thresholds = thresholds->buf;
    flag->count = chosen->buf ? (int)(chosen->len / 4) : 0;
    int ok = flag->count == 0 || (holds(chosen, flag->count, 4, "flag") && holds(thresholds, flag->count, 8, "flag"));
    for (int i = 0; ok && i < flag->count; i++)
        ok = require(flag->labels[i] >= 0 && flag->labels[i] < labels, "flag: there is no such label");
    return ok;
}

/* The buffers of a text, and of a decision about it. */
enum { PASS_BUFFERS = 3, DECISION_BUFFERS = 11 };

typedef struct {
    Decision *decisions;
    Py_buffer *decision_buffers; /* DECISION_BUFFERS for each decision */
    int num_opened;              /* number of decisions whose buffers are to be released */
    Py_buffer buffers[PASS_BUFFERS];
} Opened;

/* Fill a decision and its buffers from a tuple (see py_forward); returns 0, with an error set, if it is invalid. */
static int open_decision(const Model *m, PyObject *tuple, int tokens, Decision *d, Py_buffer *b) {
    PyObject *capsule;
    if (!PyArg_ParseTuple(tuple, "Odidz*z*ipdz*z*w*w*z*z*z*iz*z*p", &capsule, &d->tau, &d->signal.code, &d->signal.lam, &b[0],
                          &b[9], &d->deepest, &d->ask_all, &d->tau_factor, &b[1], &b[2], &b[3], &b[4], &b[10], &b[5],
                          &b[6], &d->outside, &b[7], &b[8], &d->flag.is_below))
        return 0;
    const Exits *e = d->exits = exits_of(capsule);
    if (e == NULL || !require(e->hidden == m->hidden && e->num_layers <= m->num_layers, "the exits are of another encoder"))
        return 0;
    size_t layers = e->num_layers + 1, labels = e->at[e->num_layers].num_labels;
    int each = e->pooling == EVERY_TOKEN;
    int ok = in_range(e->num_layers, d->deepest, 0) &&
             require(e->at[d->deepest].is_set && e->at[e->num_layers].is_set, "no exit at the deepest layer") &&
             has_signal(&d->signal, &b[0], (int)layers) && (!b[1].buf || holds(&b[1], labels, 8, "thresholds")) &&
             (!b[2].buf || holds(&b[2], layers, 8, "far")) && holds(&b[3], labels * layers * (each ? tokens : 1), 4, "logits") &&
             (each ? holds(&b[6], tokens, 1, "counted") : holds(&b[4], labels * layers, 4, "distances")) &&
             (!b[5].buf || ((b[5].len == (Py_ssize_t)(layers * e->hidden * 4) ||
                             holds(&b[5], (layers - 1) * e->hidden, 4, "states")) &&
                            require(!b[5].readonly, "states is read-only"))) &&
             has_flag(&d->flag, &b[7], &b[8], (int)labels) &&
             (!b[9].buf || (holds(&b[9], layers * e->hidden, 4, "state_weights") && holds(&b[10], layers, 4, "state_terms") &&
                            require(!each && b[10].buf && !b[10].readonly, "state_terms cannot be written")));
    if (!ok) return 0;
    d->signal.state_weights = b[9].buf;
    d->state_terms = b[9].buf ? b[10].buf : NULL;
    d->thresholds = b[1].buf;
    d->far = b[2].buf;
    d->logits = b[3].buf;
    d->distances = b[4].buf;
    d->states = b[5].buf;
    d->counted = b[6].buf;
    d->num_states = (int)(b[5].len / (e->hidden * 4));
    d->exit_layer = -1;
    d->readings = malloc(layers * sizeof(Reading));
    return require_memory(d->readings != NULL);
}

/* Fill a pass, its decisions and their buffers from a tuple (see py_forward); returns 0, with an error set, if it is
 * invalid. is_part: the call does not run all layers. Call close_pass in either case. */
static int open_pass(const Model *m, PyObject *text, int is_part, Pass *p, Opened *o) {
    PyObject *list;
    Py_buffer *b = o->buffers;
    if (!PyArg_ParseTuple(text, "y*z*z*O!", &b[0], &b[1], &b[2], &PyList_Type, &list)) return 0;
    size_t tokens = b[0].len / 8, count = PyList_Size(list);
    int ok = holds(&b[0], tokens, 8, "ids") && (!m->num_types || holds(&b[1], tokens, 8, "types")) &&
             (!b[2].buf || holds(&b[2], tokens * m->hidden, 4, "hidden")) &&
             require(b[2].buf ? !b[2].readonly : !is_part, "hidden is missing or read-only") &&
             require(tokens >= 1 && tokens <= MAX_TOKENS, "no tokens, or too many") &&
             require(count >= 1 && count <= MAX_DECISIONS, "1 to 16 models decide about a text");
    if (!ok) return 0;
    *p = (Pass){.ids = b[0].buf, .types = b[1].buf, .tokens = (int)tokens, .hidden = b[2].buf};
    o->decisions = p->decisions = calloc(count, sizeof(Decision));
    o->decision_buffers = calloc(count * DECISION_BUFFERS, sizeof(Py_buffer));
    if (!require_memory(o->decisions && o->decision_buffers)) return 0;
    for (; p->num_decisions < (int)count; p->num_decisions++) {
        int i = o->num_opened++;
        if (!open_decision(m, PyList_GetItem(list, i), p->tokens, &o->decisions[i], o->decision_buffers + i * DECISION_BUFFERS))
            return 0;
    }
    return 1;
}

static void close_pass(Opened *o) {
    for (int i = 0; i < o->num_opened; i++) {
        free(o->decisions[i].readings);
        for (int j = 0; j < DECISION_BUFFERS; j++) PyBuffer_Release(&o->decision_buffers[i * DECISION_BUFFERS + j]);
    }
    free(o->decisions);
    free(o->decision_buffers);
    for (int j = 0; j < PASS_BUFFERS; j++) PyBuffer_Release(&o->buffers[j]);
}

static PyObject *number_or_none(double x) { return isnan(x) ? Py_NewRef(Py_None) : PyFloat_FromDouble(x); }

/* The probabilities at an exit; an empty list for a regression model and a token classifier. */
static PyObject *probability_list(const Reading *reading, const float *logits, const double *thresholds, int num_labels) {
    int count = reading->is_value || reading->is_spans ? 0 : num_labels;
    double *values = malloc((count + 1) * sizeof(double));
    PyObject *list = values ? PyList_New(count) : PyErr_NoMemory();
    if (list != NULL) {
        if (count) probabilities(logits, thresholds, num_labels, values);
        for (int k = 0; k < count; k++) PyList_SetItem(list, k, PyFloat_FromDouble(values[k]));
    }
    free(values);
    return list;
}

static PyObject *unsure_or_none(const Reading *r) {
    if (!r->is_spans) return Py_NewRef(Py_None);
    return Py_BuildValue("ddiN", r->largest, r->total, r->tokens, PyBool_FromLong(r->found));
}

/* [(layer, label, margin, entropy, distance_ratio, nearest, score, probabilities, unsure)], a tuple for each computed
 * exit; unsure: (largest, total, tokens, found) of a token classifier, otherwise None.
 * Unless all exits were asked for, only the last has probabilities: with 150 labels they take as long as a layer. */
static PyObject *reading_list(const Decision *d) {
    PyObject *list = PyList_New(d->num_readings);
    for (int i = 0; list != NULL && i < d->num_readings; i++) {
        const Reading *r = &d->readings[i];
        int num_labels = d->ask_all || i == d->num_readings - 1 ? d->exits->at[r->layer].num_labels : 0;
        PyObject *row = Py_BuildValue(
            "iiddNNNNN", r->layer, r->label, r->margin, r->entropy, number_or_none(r->distance_ratio),
            number_or_none(r->nearest), number_or_none(r->score),
            probability_list(r, d->logits + (size_t)r->layer * num_labels, d->thresholds, num_labels), unsure_or_none(r));
        if (row == NULL) Py_CLEAR(list);
        else PyList_SetItem(list, i, row);
    }
    return list;
}

/* [exit], one for each model that decides about a text; see py_forward. */
static PyObject *exit_list(const Pass *p) {
    PyObject *list = PyList_New(p->num_decisions);
    for (int i = 0; list != NULL && i < p->num_decisions; i++) {
        const Decision *d = &p->decisions[i];
        PyObject *left = d->exit_layer < 0 ? Py_NewRef(Py_None)
                                           : Py_BuildValue("idNNN", d->exit_layer, d->seconds,
                                                           PyBool_FromLong(d->is_below_tau), PyBool_FromLong(d->is_far),
                                                           reading_list(d));
        if (left == NULL) Py_CLEAR(list);
        else PyList_SetItem(list, i, left);
    }
    return list;
}

/* forward(model, texts, first, last, at_idle=False) → [(seconds, [exit])]; see run_passes.
 * exit: (layer, seconds, is_below_tau, is_far, readings), see reading_list; None if the model has not decided. Seconds
 * are those of the text in this call, in an exit until that exit.
 * texts: [(ids int64 (T), types int64 (T) or None, hidden, [decision])], where hidden is float32 (T, H), or None if the
 * call runs all layers. decision: (exits, tau, signal, lam, weights, state_weights, deepest, ask_all, tau_factor,
 * thresholds, far, logits, distances, state_terms, states, counted, outside, flag, least, is_below), for each model that
 * has not yet decided, where
 *   weights: float64 (num_layers + 1, 5) for the signal risk, or None
 *   state_weights: float32 (num_layers + 1, H) for the signal risk, or None
 *   state_terms: float32 (num_layers + 1) if there are state_weights, filled at the exits that are computed; or None
 *   thresholds: float64 (K) for a multi-label model, or None
 *   far: float64 (num_layers + 1), or None
 *   logits, distances: float32 (num_layers + 1, K), filled at the exits that are computed; with exits for each token,
 *     logits (num_layers + 1, T, K), and distances may be empty
 *   states: float32 (num_layers, H), or with the last layer (num_layers + 1, H), or None; num_layers is that of the
 *     exits
 *   counted: uint8 (T), 1 for the tokens that can change a span, with exits for each token; otherwise None
 *   outside: the label of tokens outside of spans, or -1
 *   flag, least, is_below: labels int32 (n) and thresholds float64 (n) of a flag, or None; see Flag in exits/flags.py */
static PyObject *py_forward(PyObject *self, PyObject *args) {
    PyObject *capsule, *texts, *result = NULL;
    Opened opened[MAX_PASSES];
    Pass passes[MAX_PASSES];
    int first, last, at_idle = 0;
    if (!PyArg_ParseTuple(args, "OO!ii|p", &capsule, &PyList_Type, &texts, &first, &last, &at_idle)) return NULL;
    const Model *m = model_of(capsule);
    int count = (int)PyList_Size(texts), begun = 0, failed;
    int ok = m != NULL && in_range(m->num_layers, last, 0) &&
             require(first >= 0 && first <= last, "the first layer comes after the last") &&
             require(count >= 1 && count <= MAX_PASSES, "1 to 64 texts");
    for (int i = 0; ok && i <= m->num_layers; i++) ok = require(is_complete(m, i), "a layer is not complete");
    while (ok && begun < count) {
        int i = begun++;
        memset(&opened[i], 0, sizeof opened[i]);
        passes[i] = (Pass){0};
        ok = open_pass(m, PyList_GetItem(texts, i), first || last < m->num_layers, &passes[i], &opened[i]);
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        failed = (at_idle ? run_passes_at_idle : run_passes)(m, passes, count, first, last);
        Py_END_ALLOW_THREADS;
        ok = require(!failed, "an id outside the tables, or out of memory");
    }
    if (ok) result = PyList_New(count);
    for (int i = 0; result != NULL && i < count; i++) {
        PyObject *pair = Py_BuildValue("dN", passes[i].seconds, exit_list(&passes[i]));
        if (pair == NULL) Py_CLEAR(result);
        else PyList_SetItem(result, i, pair);
    }
    for (int i = 0; i < begun; i++) close_pass(&opened[i]);
    return result;
}

/* ---- the rule, for the tests ------------------------------------------------------------------------ */

/* score(exits, signal, lam, weights, thresholds). exits: [(logits (K), distances (K) or None, state_term=0)], of layers
 * 0, 1, … thresholds: float64 (K) of a multi-label model, or None. */
static PyObject *py_score(PyObject *self, PyObject *args) {
    PyObject *list;
    Signal signal;
    Reading readings[MAX_LAYERS + 1];
    Py_buffer weights = {0}, thresholds = {0};
    if (!PyArg_ParseTuple(args, "O!idz*z*", &PyList_Type, &list, &signal.code, &signal.lam, &weights, &thresholds))
        return NULL;
    int count = (int)PyList_Size(list);
    int ok = require(count >= 1 && count <= MAX_LAYERS + 1, "1 to 101 exits") && has_signal(&signal, &weights, count);
    for (int i = 0; ok && i < count; i++) {
        Py_buffer b[2] = {0};
        double term = 0.0;
        ok = PyArg_ParseTuple(PyList_GetItem(list, i), "y*z*|d", &b[0], &b[1], &term);
        int labels = (int)(b[0].len / 4);
        ok = ok && require(labels >= 1, "no logits") && holds(&b[0], labels, 4, "logits") &&
             (!b[1].buf || holds(&b[1], labels, 4, "distances"));
        ok = ok && (!thresholds.buf || holds(&thresholds, labels, 8, "thresholds"));
        if (ok) readings[i] = read_exit(i, b[0].buf, b[1].buf, thresholds.buf, labels);
        if (ok) readings[i].state_term = term;
        for (int j = 0; j < 2; j++) PyBuffer_Release(&b[j]);
    }
    double value = ok ? score(signal, readings, count) : 0.0;
    PyBuffer_Release(&weights);
    PyBuffer_Release(&thresholds);
    return ok ? PyFloat_FromDouble(value) : NULL;
}

/* score_tokens(logits (T, K), counted (T), num_labels, outside, weights (1, 5)) → (score, (largest, total, tokens, found)) */
static PyObject *py_score_tokens(PyObject *self, PyObject *args) {
    int labels, outside;
    Py_buffer b[3];
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*iiy*", &b[0], &b[1], &labels, &outside, &b[2])) return NULL;
    if (require(labels >= 2, "2 labels or more") && holds(&b[0], (size_t)b[1].len * labels, 4, "logits") &&
        holds(&b[2], RISK_FEATURES, 8, "weights")) {
        Reading r = read_tokens(0, b[0].buf, b[1].buf, (int)b[1].len, labels, outside);
        result = Py_BuildValue("dN", score((Signal){.code = RISK, .weights = b[2].buf}, &r, 1), unsure_or_none(&r));
    }
    for (int i = 0; i < 3; i++) PyBuffer_Release(&b[i]);
    return result;
}

static PyObject *py_exits(PyObject *self, PyObject *args) {
    double score, tau;
    if (!PyArg_ParseTuple(args, "dd", &score, &tau)) return NULL;
    return PyBool_FromLong(exits(score, tau));
}

static PyMethodDef methods[] = {
    {"implementations", py_implementations, METH_NOARGS, "Implementations that this machine can run, the best first."},
    {"supported", py_supported, METH_NOARGS, "Implementation in use; empty for the reference, unless use() chose it."},
    {"why_not", py_why_not, METH_NOARGS, "Reason why this machine runs only the reference, if supported() is empty."},
    {"use", py_use, METH_VARARGS, "use(name): select an implementation, for tests; empty: the best."},
    {"peak", py_peak, METH_NOARGS, "Peak rate of one core, int8 multiply-adds per second."},
    {"new", py_new, METH_VARARGS,
     "new(hidden, num_heads, inner, num_layers, num_words, gelu, gate, fd=-1, is_filled=False)"},
    {"new_exits", py_new_exits, METH_VARARGS, "new_exits(hidden, num_layers, pooling)"},
    {"seal", py_seal, METH_VARARGS, "seal(model, fd)"},
    {"set_linear", py_set_linear, METH_VARARGS, "set_linear(model, layer, which, weight, scale, bias)"},
    {"set_norm", py_set_norm, METH_VARARGS, "set_norm(model, layer, which, scale, shift, epsilon)"},
    {"set_offsets", py_set_offsets, METH_VARARGS, "set_offsets(model, layer, values)"},
    {"set_window", py_set_window, METH_VARARGS, "set_window(model, layer, window)"},
    {"set_rotation", py_set_rotation, METH_VARARGS, "set_rotation(model, layers, cos, sin)"},
    {"set_terms", py_set_terms, METH_VARARGS, "set_terms(model, layer, scale, buckets, keys, queries)"},
    {"set_embeddings", py_set_embeddings, METH_VARARGS, "set_embeddings(model, words, scales, positions, types)"},
    {"set_exit", py_set_exit, METH_VARARGS,
     "set_exit(exits, layer, classifier, bias, weight, scale, metric_bias, prototypes)"},
    {"set_exit_norm", py_set_exit_norm, METH_VARARGS, "set_exit_norm(exits, layer, scale, shift, epsilon, is_of_head)"},
    {"set_head", py_set_head, METH_VARARGS, "set_head(exits, dense, bias, activation, pooling)"},
    {"run", py_run, METH_VARARGS, "run(model, layer, from, types, to)"},
    {"run_exit", py_run_exit, METH_VARARGS, "run_exit(exits, layer, hidden, logits, distances, state_weights=None)"},
    {"forward", py_forward, METH_VARARGS, "forward(model, texts, first, last, at_idle=False)"},
    {"score", py_score, METH_VARARGS, "score(exits, signal, lam, weights, thresholds): the exits of layers 0, 1, …"},
    {"score_tokens", py_score_tokens, METH_VARARGS, "score_tokens(logits, counted, num_labels, outside, weights)"},
    {"exits", py_exits, METH_VARARGS, "exits(score, tau)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_kernels(void) {
    use_best();
    return PyModule_Create(&definition);
}
