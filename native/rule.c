#include "rule.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define SMALLEST 1e-12 /* lower bound on the argument of a logarithm */

static double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; } /* keeps NaN */

/* The most probable class other than `skip` (-1: none); ties: lowest index. */
static int best(const float *logits, int num_labels, int skip) {
    int top = skip == 0 ? 1 : 0;
    for (int k = top + 1; k < num_labels; k++)
        if (k != skip && logits[k] > logits[top]) top = k;
    return top;
}

static Reading read_classes(int layer, const float *logits, const float *distances, int num_labels) {
    Reading reading = {.layer = layer, .label = best(logits, num_labels, -1), .distance_ratio = NAN, .nearest = NAN};
    double top = logits[reading.label], total = 0.0, mean = 0.0;
    for (int k = 0; k < num_labels; k++) total += exp(logits[k] - top);
    for (int k = 0; k < num_labels; k++) mean += exp(logits[k] - top) / total * (logits[k] - top);
    int second = best(logits, num_labels, reading.label);
    reading.margin = top - logits[second];
    reading.entropy = clip((log(total) - mean) / log(num_labels), 0.0, 1.0);
    if (distances == NULL) return reading;

    double r1 = clip(distances[reading.label], 0.0, 2.0);
    double r2 = clip(distances[second], 0.0, 2.0);
    double largest = r1 > r2 ? r1 : r2;
    reading.distance_ratio = largest != 0.0 ? 0.5 * (1.0 + (r1 - r2) / largest) : 0.5;
    float nearest = distances[0];
    for (int k = 1; k < num_labels; k++)
        if (distances[k] < nearest) nearest = distances[k];
    reading.nearest = nearest;
    return reading;
}

static Reading read_labels(int layer, const float *logits, const double *thresholds, int num_labels) {
    Reading reading = {.layer = layer, .label = best(logits, num_labels, -1), .distance_ratio = NAN, .nearest = NAN};
    double total = 0.0;
    reading.margin = INFINITY;
    for (int k = 0; k < num_labels; k++) {
        double x = logits[k], magnitude = fabs(x), e = exp(-magnitude);
        total += log1p(e) + magnitude * e / (1.0 + e);
        double gap = fabs(x - thresholds[k]);
        if (gap < reading.margin) reading.margin = gap;
    }
    reading.entropy = clip(total / (num_labels * log(2.0)), 0.0, 1.0);
    return reading;
}

Reading read_exit(int layer, const float *logits, const float *distances, const double *thresholds, int num_labels) {
    if (num_labels == 1) {
        Reading reading = {.layer = layer, .is_value = 1, .value = logits[0]};
        reading.margin = reading.entropy = reading.distance_ratio = reading.nearest = NAN;
        return reading;
    }
    return thresholds ? read_labels(layer, logits, thresholds, num_labels)
                      : read_classes(layer, logits, distances, num_labels);
}

/* e^x for x <= 0, to float32's precision; 1.8e-35 for x < -80. Only additions and multiplications, which NumPy rounds
 * in the same way (exits/formulas.py: small_exp), and which compilers vectorize. */
static inline float small_exp(float x) {
    x = x < -80.0f ? -80.0f : x;                       /* keeps NaN */
    float shifted = x * 1.44269504f + 12582912.0f;      /* rounds to a whole number */
    float whole = shifted - 12582912.0f;
    float r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    float y = 1.98756915e-4f;
    y = y * r + 1.39819995e-3f;
    y = y * r + 8.33345191e-3f;
    y = y * r + 4.16657959e-2f;
    y = y * r + 1.66666655e-1f;
    y = y * r + 0.5f;
    y = (y * r) * r + r;
    y = y + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000 + 127) << 23; /* 2^whole */
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

enum { STRIP = 64 }; /* labels whose exponentials are computed together */

/* 1 - p of a token, where p is its highest probability. */
static float rest(const float *logits, int num_labels, int top) {
    float e[STRIP], total = 0.0f, highest = logits[top];
    for (int first = 0; first < num_labels; first += STRIP) {
        int count = num_labels - first < STRIP ? num_labels - first : STRIP;
        for (int k = 0; k < count; k++) e[k] = small_exp(logits[first + k] - highest);
        if (top >= first && top < first + count) e[top - first] = 0.0f;
        for (int k = 0; k < count; k++) total += e[k];
    }
    return total / (1.0f + total);
}

Reading read_tokens(int layer, const float *logits, const uint8_t *counted, int tokens, int num_labels, int outside) {
    Reading reading = {.layer = layer, .is_spans = 1};
    reading.margin = reading.entropy = reading.distance_ratio = reading.nearest = NAN;
    for (int t = 0; t < tokens; t++, logits += num_labels) {
        if (!counted[t]) continue;
        int top = best(logits, num_labels, -1);
        double unsure = rest(logits, num_labels, top);
        if (unsure > reading.largest || isnan(unsure)) reading.largest = unsure; /* keeps NaN */
        reading.total += unsure;
        reading.tokens++;
        reading.found |= top != outside;
    }
    return reading;
}

static double sigmoid(double x) { return x >= 0.0 ? 1.0 / (1.0 + exp(-x)) : exp(x) / (1.0 + exp(x)); }

void probabilities(const float *logits, const double *thresholds, int num_labels, double *to) {
    if (thresholds) {
        for (int k = 0; k < num_labels; k++) to[k] = sigmoid(logits[k]);
        return;
    }
    double top = logits[best(logits, num_labels, -1)], total = 0.0;
    for (int k = 0; k < num_labels; k++) total += to[k] = exp(logits[k] - top);
    for (int k = 0; k < num_labels; k++) to[k] /= total;
}

int is_blocked(const Flag *flag, const Reading *reading, const float *logits, const double *thresholds, int num_labels) {
    if (flag->count == 0 || reading->is_spans) return flag->count && reading->found;
    double least = flag->thresholds[0], top = logits[reading->label], total = 0.0, found = 0.0;
    if (reading->is_value)
        return flag->is_below ? !(reading->value > least) : !(reading->value < least);
    if (thresholds) {
        for (int i = 0; i < flag->count; i++)
            if (!(sigmoid(logits[flag->labels[i]]) < flag->thresholds[i])) return 1;
        return 0;
    }
    for (int k = 0; k < num_labels; k++) total += exp(logits[k] - top);
    for (int i = 0; i < flag->count; i++) found += exp(logits[flag->labels[i]] - top) / total;
    return !(found < least);
}

static double at_least(double x, double low) { return x < low ? low : x; } /* keeps NaN */

/* z of the logistic regression: see Risk in exits/signals.py. */
static double risk_logit(const double *w, const Reading *r) {
    if (r->is_value) return w[0] + w[1] * r->value + w[2] * (r->value * r->value);
    if (r->is_spans) {
        double z = w[0] + w[1] * log(at_least(r->largest, SMALLEST)) + w[2] * log(at_least(r->total, SMALLEST));
        return z + w[3] * log(at_least(r->tokens, 1.0)) + w[4] * r->found;
    }
    double z = w[0] + w[1] * r->margin + w[2] * r->entropy + w[3] * log(at_least(r->entropy, SMALLEST));
    return w[4] != 0.0 ? z + w[4] * log(at_least(r->distance_ratio, SMALLEST)) : z;
}

double score(Signal signal, const Reading *readings, int count) {
    const Reading *last = &readings[count - 1];
    switch (signal.code) {
    case ENTROPY:
        return last->entropy;
    case EDR: {
        if (signal.lam == 0.0) return last->entropy;
        double denominator = signal.lam * last->entropy + last->distance_ratio;
        return denominator != 0.0 ? (signal.lam + 1.0) * last->entropy * last->distance_ratio / denominator : 0.0;
    }
    case RISK: {
        const double *w = signal.weights + RISK_FEATURES * last->layer;
        return 1.0 / (1.0 + exp(-clip(risk_logit(w, last) + last->state_term, -700.0, 700.0)));
    }
    default:
        return NAN;
    }
}

int may_exit(Signal signal, int layer) {
    if (signal.code != RISK) return 1;
    const double *w = signal.weights + RISK_FEATURES * layer;
    return !(w[0] == 50.0 && w[1] == 0.0 && w[2] == 0.0 && w[3] == 0.0 && w[4] == 0.0); /* UNUSED in exits/signals.py */
}

int exits(double score, double tau) { return score < tau; }
