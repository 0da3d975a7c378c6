/* One encoder layer, the embeddings, an exit, and a pass of several texts through all layers.
 *
 * The arithmetic of the int8 segments (export/graph.py), operator by operator: activations quantized to uint8
 * with a scale for each row, int8 weights with a scale for each output, everything else in float32. Every function returns 0, or -1: an id outside the tables, or no memory.
 */
#ifndef NATIVE_LAYERS_H
#define NATIVE_LAYERS_H

#include "model.h"
#include "rule.h"

/* ids (tokens), types (tokens) or NULL → to (tokens, hidden). */
int run_embeddings(const Model *m, const int64_t *ids, const int64_t *types, int tokens, float *to);

/* The rows of `count` texts, one after the other, from (Σ tokens, hidden) → to (Σ tokens, hidden); from may be to.
 * What a text gives does not depend on the others. */
int run_layer(const Model *m, int layer, const float *from, const int *tokens, int count, float *to);

/* hidden states (tokens, hidden), prototypes (num_labels, metric) → logits and cosine distances (num_labels).
 * Without a metric space, prototypes and distances are not used. */
int run_exit(const Model *m, int layer, const float *hidden, int tokens, const float *prototypes, float *logits,
             float *distances);

/* A text's pass through the layers. */
typedef struct {
    const int64_t *ids, *types; /* (tokens) */
    int tokens, deepest;        /* deepest: the layer at which it exits at the latest */
    int ask_all;                /* compute every exit passed, also those at which it cannot leave (tau 0) */
    double tau;
    Signal signal;
    const double *thresholds; /* of a multi-label model, as logits (num_labels); NULL: classes exclude each other */
    double caution; /* what tau is multiplied by from the first exit on that is too far from its prototypes */

    float *hidden;             /* (tokens, hidden): before the first layer, after the last; or NULL */
    float *logits, *distances; /* (num_layers + 1, num_labels) */
    Reading *readings;         /* of the exits computed so far; room for (num_layers + 1) */
    int num_readings;

    int exit_layer;   /* -1: it has not left */
    int is_below_tau; /* its score at exit_layer is below tau */
    int is_far;       /* an exit was too far from its prototypes */
    double seconds;
} Pass;

enum { MAX_PASSES = 64 };

/* Run layers first … last, until each text has left. All texts run a layer together, so that its weights come from
 * memory once for all of them; what each gives does not depend on the others. From first > 0 on a pass goes on: its
 * hidden states, and the logits and distances of the exits that it passed, are those of the call before.
 * prototypes: by layer. far: the largest distance to the nearest prototype by layer, or NULL. */
int run_passes(const Model *m, Pass *passes, int count, int first, int last, const float *const *prototypes,
               const double *far);

/* The same, at the lowest priority that the system has: other threads preempt it. */
int run_passes_at_idle(const Model *m, Pass *passes, int count, int first, int last, const float *const *prototypes,
                       const double *far);

#endif
