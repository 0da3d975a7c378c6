/* Operations in plain C. Each implementation includes them, so that they are compiled for its instruction set. */
#ifndef NATIVE_PLAIN_H
#define NATIVE_PLAIN_H

static inline void rotate(float *rows, int tokens, size_t stride, int parts, int width, const float *cos, const float *sin) {
    int half = width / 2;
    for (int t = 0; t < tokens; t++)
        for (int part = 0; part < parts; part++) {
            float *restrict a = rows + t * stride + (size_t)part * width, *restrict b = a + half;
            const float *restrict c = cos + (size_t)t * half, *restrict s = sin + (size_t)t * half;
            for (int i = 0; i < half; i++) {
                float x = a[i], y = b[i];
                a[i] = x * c[i] - y * s[i];
                b[i] = y * c[i] + x * s[i];
            }
        }
}

static inline void add_terms(float *scores, int count, const int32_t *rows, const float *ours, const float *theirs, size_t stride) {
    for (int i = 0; i < count; i++) {
        float added = ours ? ours[rows[i]] : 0.0f;
        if (theirs) added += theirs[(size_t)i * stride + rows[i]];
        scores[i] += added;
    }
}

#endif
