// Kernels that another one is made of. What they compute is said where they are defined.
#pragma once

#include <cstdint>

#include "simd.h"

void add_rms_norm(const float* x, float* residual, const float* weight, float* normed,
                  int64_t rows, int64_t hidden, float eps);

void linear_float32(const float* x, int64_t rows, int64_t inputs, const float* packed,
                    int64_t outputs, bool gate, const float* bias, float* out);

void linear_bfloat16(const float* x, int64_t rows, int64_t inputs, const simd::bf16* packed,
                     int64_t outputs, bool gate, const float* bias, float* out);

void linear_int8(const float* x, int64_t rows, int64_t inputs, const int8_t* packed,
                 const float* scales, const int32_t* sums, int64_t outputs, bool gate,
                 const float* bias, float* out);

int64_t rope_write(const float* qkv, int64_t rows, int64_t heads, int64_t kv_heads,
                   int64_t head_dim, const float* q_norm, const float* k_norm, float eps,
                   const float* cos, const float* sin, void* keys, void* values,
                   int64_t page_type, int64_t stride, int64_t count, const int64_t* slots,
                   float* q);

int64_t attend_singles(const float* q, int64_t sequences, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, const void* keys, const void* values, int64_t page_type,
                       int64_t stride, int64_t slots, const int32_t* contexts,
                       const int32_t* blocks, int64_t width, int64_t block_size, int64_t window,
                       float scale, float* out);

void rows_float32(const int64_t* ids, int64_t count, int64_t inputs, const float* packed,
                  float* out);

void rows_bfloat16(const int64_t* ids, int64_t count, int64_t inputs, const simd::bf16* packed,
                   float* out);

void rows_int8(const int64_t* ids, int64_t count, int64_t inputs, const int8_t* packed,
               const float* scales, float* out);
