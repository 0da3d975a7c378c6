/* Attention of a text, head by head and tile by tile. */
#ifndef NATIVE_ATTENTION_H
#define NATIVE_ATTENTION_H

#include "model.h"

/* Number of floats of `work` that `attend` needs for texts of at most this many tokens; linear in the number of
 * tokens. width: of a head. */
size_t attention_work(const Attention *a, int width, int tokens);

/* softmax(scale · Q·Kᵀ + offsets and terms)·V for each head. qkv (tokens, 3·hidden) is overwritten; to: (tokens, hidden).
 * tokens: at most the positions of the layer's tables. */
void attend(const Attention *a, float *qkv, int tokens, int hidden, float *work, float *to);

#endif
