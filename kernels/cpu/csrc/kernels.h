// Kernels that others are made of.
#pragma once
#include "matrix.h"

extern "C" {
void qwenrun_cpu_linear(const Matrix *w, const float *x, int64_t tokens, float *y);
void qwenrun_cpu_linears(const Matrix *const *ws, int64_t count, const float *x, int64_t tokens, const float *norm,
                         float eps, float *y);
void qwenrun_cpu_rms_norm(const float *x, const float *w, float shift, float eps, int64_t rows, int64_t size,
                          float *out);
void qwenrun_cpu_top_k(const float *logits, int64_t tokens, int64_t count, int64_t k, int64_t *index, float *weight);
}
