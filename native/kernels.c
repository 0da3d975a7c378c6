#include "kernels.h"

#define ADDRESS(name) &name##_kernels,
const Kernels *const all_kernels[] = {IMPLEMENTATIONS(ADDRESS)};
const int num_kernels = sizeof all_kernels / sizeof all_kernels[0];
const Kernels *kernels;

void choose_kernels(void) {
    int i = 0;
    while (all_kernels[i]->why_not() != NULL) i++;
    kernels = all_kernels[i];
}
