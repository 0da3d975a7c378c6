/* The embeddings, an encoder layer, an exit, and the forward pass of several texts.
 *
 * They compute the same as the int8 segments (model_store/segment_graph.py), operator by operator: activations are
 * quantized to uint8 with a scale and center for each row, int8 weights have a scale for each output, and everything
 * else is float32. Every function returns 0, or -1 for an id or a length beyond the tables, or if memory runs out.
 */
#ifndef NATIVE_LAYERS_H
#define NATIVE_LAYERS_H

#include "model.h"
#include "rule.h"

/* ids (tokens), types (tokens) or NULL → to (tokens, hidden). */
int run_embeddings(const Model *m, const int64_t *ids, const int64_t *types, int tokens, float *to);

/* Run a layer for `count` consecutive texts, from (Σ tokens, hidden) → to (Σ tokens, hidden), with the number of tokens
 * of each text in `tokens`; from may be to.
 * The result of a text does not depend on the others. */
int run_layer(const Model *m, int layer, const float *from, const int *tokens, int count, float *to);

/* Hidden states (tokens, hidden) → logits and cosine distances to the prototypes (num_labels) of a layer's exit; with
 * EVERY_TOKEN, logits of each token (tokens, num_labels). Without a metric space, distances are not used. mean: the mean
 * of the tokens, for an exit that takes_mean; or NULL. state_weights: (hidden); term is their product with the pooled
 * state. NULL, as always with EVERY_TOKEN: term is not used. */
int run_exit(const Exits *e, int layer, const float *hidden, int tokens, const float *mean, const float *state_weights,
             float *logits, float *distances, float *term);

/* The decision of one model about a text: where the text exits, and the readings there. */
typedef struct {
    const Exits *exits;
    int deepest; /* the last layer at which the text may exit, one with an exit */
    int ask_all; /* compute every exit, even those at which the text cannot exit (tau 0, may_exit) */
    double tau;
    Signal signal;
    const double *thresholds; /* for a multi-label model: logits (num_labels); NULL for other models */
    const double *far; /* by layer: the largest allowed distance to the nearest prototype; NULL: no limit */
    Flag flag;         /* a text that would exit with a reading that this blocks runs to the deepest layer */
    double tau_factor; /* factor applied to tau once the text is too far from every prototype of an exit */

    const uint8_t *counted; /* with EVERY_TOKEN: 1 for the tokens that can change a span (tokens); otherwise NULL */
    int outside;            /* with EVERY_TOKEN: the label of tokens outside of spans; -1: none */

    /* (num_layers + 1, num_labels); with EVERY_TOKEN, logits (num_layers + 1, tokens, num_labels), no distances */
    float *logits, *distances;
    float *state_terms;        /* (num_layers + 1); NULL unless the signal has state_weights */
    float *states;             /* (num_states, hidden): mean of the tokens after each layer; or NULL */
    int num_states;            /* num_layers + 1 or, without the last layer, num_layers */
    Reading *readings;         /* readings of the exits computed so far; space for num_layers + 1 */
    int num_readings;

    int exit_layer;   /* -1: the text has not exited */
    int is_below_tau; /* the score at exit_layer is below tau */
    int is_far;       /* the text was too far from every prototype of some exit */
    double seconds;   /* time of the text until this exit */
} Decision;

/* The forward pass of a text: several models that have the same encoder can each decide about it. */
typedef struct {
    const int64_t *ids, *types; /* (tokens) */
    int tokens;
    float *hidden; /* (tokens, hidden): input of the first layer, output of the last; or NULL */
    Decision *decisions;
    int num_decisions;
    double seconds; /* time of the text: its share of each layer, and its exits */
} Pass;

enum { MAX_PASSES = 64, MAX_DECISIONS = 16 };

/* Run layers first … last; a text about which all models have decided skips the rest. All texts run a layer together, so its weights are read
 * from memory once; the result of a text does not depend on the others. With first > 0 the passes continue: hidden
 * states, logits and distances are those of the previous call. */
int run_passes(const Model *m, Pass *passes, int count, int first, int last);

/* Like run_passes, but at the system's lowest priority: any other thread preempts it. If no thread can be created for
 * it, it runs at normal priority. */
int run_passes_at_idle(const Model *m, Pass *passes, int count, int first, int last);

#endif
