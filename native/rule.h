/* The exit decision, operation by operation the same as in exits/reading.py, exits/signals.py and exits/rule.py.
 *
 * Everything is float64, in Python's order and without fused multiply-adds (-ffp-contract=off), so that C
 * and Python make the same decision for every text (tests/test_native.py).
 */
#ifndef NATIVE_RULE_H
#define NATIVE_RULE_H

#include <stdint.h>

/* One exit's output for one text. */
typedef struct {
    int layer;
    int label;                      /* the most probable class (ties: lowest index) */
    int is_value;                   /* a regression model: value, the only logit, is the answer; margin, entropy: NaN */
    double value;
    int is_spans;                   /* of a token classifier: largest, total, tokens and found; margin, entropy: NaN */
    double largest, total;          /* the largest and the sum of 1 - p of the counted tokens; p: highest probability */
    int tokens;                     /* number of counted tokens */
    int found;                      /* the most probable label of a counted token is not `outside` */
    double margin;                  /* the two highest logits' difference; multi-label: least distance to a threshold */
    double entropy;                 /* in [0, 1] */
    double distance_ratio, nearest; /* in [0, 1] and [0, 2]; NaN at an exit without prototypes */
    double state_term;              /* the exit's pooled state times the signal's weights of it; 0 if it has none */
    double score;                   /* the signal's score, in [0, 1]; NaN: undefined at this exit */
} Reading;

/* The signal whose score is compared with tau: the `code` of a signal in exits/signals.py. */
enum { ENTROPY, EDR, RISK, NUM_SIGNALS };
#define RISK_FEATURES 5

typedef struct {
    int code;
    double lam;           /* EDR's weight of the distance ratio */
    const double *weights; /* RISK's, (num_layers + 1, RISK_FEATURES): see exits/signals.py; NaN: no exit */
    const float *state_weights; /* (num_layers + 1, hidden), for Reading.state_term; NULL: none */
} Signal;

/* What a guard looks for: see Flag in exits/flags.py. */
typedef struct {
    const int32_t *labels;    /* (count) */
    const double *thresholds; /* (count); of classes and a value, only the first is used */
    int count, is_below;      /* count 0: no flag */
} Flag;

/* Read the exit of a layer: its logits and its distances to the prototypes, num_labels each; distances NULL: it has no
 * prototypes. thresholds: of a multi-label model, as logits, num_labels; NULL: another kind of model. One label means
 * regression. */
Reading read_exit(int layer, const float *logits, const float *distances, const double *thresholds, int num_labels);

/* Read the exit of a token classifier: logits (tokens, num_labels). counted, outside: see Decision. */
Reading read_tokens(int layer, const float *logits, const uint8_t *counted, int tokens, int num_labels, int outside);

/* The probabilities of an exit's labels, num_labels: the softmax, or with thresholds the sigmoid of each logit. */
void probabilities(const float *logits, const double *thresholds, int num_labels, double *to);

/* True if no text exits early with this reading. logits, thresholds, num_labels: see read_exit. */
int is_blocked(const Flag *flag, const Reading *reading, const float *logits, const double *thresholds, int num_labels);

/* The signal at the last of `count` computed exits of a text, in [0, 1]; NaN: undefined at this exit. */
double score(Signal signal, const Reading *readings, int count);

/* False if no text exits at this layer: its risk is always 1. */
int may_exit(Signal signal, int layer);

/* True if the score is below tau; false for NaN. */
int exits(double score, double tau);

#endif
