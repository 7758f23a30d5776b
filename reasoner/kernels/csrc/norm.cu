// RMSNorm forward and backward, and one launch for what a decode step does before attention: normalise the latent,
// rotate the shared key and the queries, write the latent cache.
//
// Layout: x (rows, width) and weight (width) of one type, float32 or bf16; rstd (rows) float32; d_weight (blocks,
//         width) float32, to be summed over blocks by the caller. kv (tokens, latent + rotary); cos, sin (tokens,
//         rotary / 2) float32; slots (tokens) int64: flat row of the cache, negative to skip; cache (rows, latent +
//         rotary); q: pointers and strides to the rotary parts of the queries; turned (tokens, heads, rotary).
// Limits: width up to 16384 in the backward (its sums lie in shared memory); rotary even.
// Source: RMSNorm, Zhang & Sennrich 2019; y = weight * round(x * rstd), rounded as transformers rounds it. Pairs (0,1),
//         (2,3), ... are rotated and stored as firsts, then seconds.
#include "device.cuh"

namespace {

constexpr int block = 256;

template <class T> DEVICE float rounded(float value) { return to_float(from_float<T>(value)); }

template <class T>
KERNEL(block) normalise(const T* x, const T* weight, T* y, float* rstd, int width, float eps) {
    const T* line = x + static_cast<i64>(block_x()) * width;
    T* out = y + static_cast<i64>(block_x()) * width;
    bool vectors = width % 8 == 0;
    float squares = 0.0f, value[8], factor[8];
    for (int first = thread() * 8; first < width; first += block * 8) {
        load_eight(line + first, value, width - first, vectors);
        UNROLL for (int j = 0; j < 8; ++j) squares += value[j] * value[j];
    }
    squares = block_sum(squares, reinterpret_cast<float*>(shared_memory()));
    float scale = rsqrt_of(squares / width + eps);
    if (thread() == 0) rstd[block_x()] = scale;
    for (int first = thread() * 8; first < width; first += block * 8) {
        load_eight(line + first, value, width - first, vectors);
        load_eight(weight + first, factor, width - first, vectors);
        UNROLL for (int j = 0; j < 8; ++j) value[j] = factor[j] * rounded<T>(value[j] * scale);
        store_eight(out + first, value, width - first, vectors);
    }
}

// d x = rstd (w dy - x rstd^2 mean(w dy x)),  d w = sum over rows of dy x rstd.
template <class T>
KERNEL(block) normalise_gradient(const T* x, const T* weight, const float* rstd, const T* by_y, T* d_x,
                                 float* d_weight, int rows, int width) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    float* scratch = sums + width;
    bool vectors = width % 8 == 0;
    float value[8], factor[8], by[8];
    for (int first = thread() * 8; first < width; first += block * 8)
        // each thread's own columns, here and below
        for (int j = 0; j < 8 && first + j < width; ++j) sums[first + j] = 0.0f;
    for (int row = block_x(); row < rows; row += blocks_x()) {
        const T* line = x + static_cast<i64>(row) * width;
        const T* by_line = by_y + static_cast<i64>(row) * width;
        float scale = rstd[row], dot = 0.0f;
        for (int first = thread() * 8; first < width; first += block * 8) {
            load_eight(line + first, value, width - first, vectors);
            load_eight(weight + first, factor, width - first, vectors);
            load_eight(by_line + first, by, width - first, vectors);
            UNROLL for (int j = 0; j < 8; ++j) {
                dot += value[j] * factor[j] * by[j];
                if (first + j < width) sums[first + j] += by[j] * value[j] * scale;
            }
        }
        dot = block_sum(dot, scratch) * scale * scale / width;
        for (int first = thread() * 8; first < width; first += block * 8) {
            load_eight(line + first, value, width - first, vectors);
            load_eight(weight + first, factor, width - first, vectors);
            load_eight(by_line + first, by, width - first, vectors);
            UNROLL for (int j = 0; j < 8; ++j) value[j] = scale * (factor[j] * by[j] - value[j] * dot);
            store_eight(d_x + static_cast<i64>(row) * width + first, value, width - first, vectors);
        }
    }
    for (int first = thread() * 8; first < width; first += block * 8)
        for (int j = 0; j < 8 && first + j < width; ++j)
            d_weight[static_cast<i64>(block_x()) * width + first + j] = sums[first + j];
}

template <class T>
KERNEL(block) write_latent(const T* kv, const T* weight, const float* cos, const float* sin, const i64* slots,
                           T* cache, const T* q, T* turned, int latent, int rotary, int heads, i64 q_token, i64 q_head,
                           float eps) {
    int token = block_x(), pairs = rotary / 2;
    const T* line = kv + static_cast<i64>(token) * (latent + rotary);
    const float* c = cos + static_cast<i64>(token) * pairs;
    const float* s = sin + static_cast<i64>(token) * pairs;
    auto turn = [&](const T* from, T* to, int pair) {
        float even = to_float(from[2 * pair]), odd = to_float(from[2 * pair + 1]);
        to[pair] = from_float<T>(even * c[pair] - odd * s[pair]);
        to[pairs + pair] = from_float<T>(odd * c[pair] + even * s[pair]);
    };
    for (int i = thread(); i < heads * pairs; i += block)
        turn(q + token * q_token + i / pairs * q_head, turned + (static_cast<i64>(token) * heads + i / pairs) * rotary,
             i % pairs);
    if (slots[token] < 0) return;
    T* row = cache + slots[token] * (latent + rotary);
    float squares = 0.0f;
    for (int i = thread(); i < latent; i += block) squares += to_float(line[i]) * to_float(line[i]);
    float scale = rsqrt_of(block_sum(squares, reinterpret_cast<float*>(shared_memory())) / latent + eps);
    for (int i = thread(); i < latent; i += block)
        row[i] = from_float<T>(to_float(weight[i]) * rounded<T>(to_float(line[i]) * scale));
    for (int i = thread(); i < pairs; i += block) turn(line + latent, row + latent, i);
}

template <class T>
int start_gradient(const void* x, const void* weight, const float* rstd, const void* by_y, void* d_x, float* d_weight,
                   i64 rows, i64 width, i64 blocks, void* stream) {
    return launch(normalise_gradient<T>, {static_cast<int>(blocks)}, block, (width + 33) * sizeof(float), stream,
                  static_cast<const T*>(x), static_cast<const T*>(weight), rstd, static_cast<const T*>(by_y),
                  static_cast<T*>(d_x), d_weight, rows, width);
}

template <class T>
int start_write(const void* kv, const void* weight, const float* cos, const float* sin, const i64* slots, void* cache,
                const void* q, void* turned, i64 tokens, i64 latent, i64 rotary, i64 heads, i64 q_token, i64 q_head,
                float eps, void* stream) {
    return launch(write_latent<T>, {static_cast<int>(tokens)}, block, 33 * sizeof(float), stream,
                  static_cast<const T*>(kv), static_cast<const T*>(weight), cos, sin, slots, static_cast<T*>(cache),
                  static_cast<const T*>(q), static_cast<T*>(turned), latent, rotary, heads, q_token, q_head, eps);
}

template <class T>
int start(const void* x, const void* weight, void* y, float* rstd, i64 rows, i64 width, float eps, void* stream) {
    return launch(normalise<T>, {static_cast<int>(rows)}, block, 33 * sizeof(float), stream, static_cast<const T*>(x),
                  static_cast<const T*>(weight), static_cast<T*>(y), rstd, width, eps);
}

}  // namespace

extern "C" int norm_forward(const void* x, const void* weight, void* y, float* rstd, i64 rows, i64 width, i64 half,
                            float eps, void* stream) {
    return (half ? start<bf16> : start<float>)(x, weight, y, rstd, rows, width, eps, stream);
}
extern "C" int norm_backward(const void* x, const void* weight, const float* rstd, const void* by_y, void* d_x,
                             float* d_weight, i64 rows, i64 width, i64 blocks, i64 half, void* stream) {
    return (half ? start_gradient<bf16> : start_gradient<float>)(x, weight, rstd, by_y, d_x, d_weight, rows, width,
                                                                 blocks, stream);
}
extern "C" int norm_write_latent(const void* kv, const void* weight, const float* cos, const float* sin,
                                 const i64* slots, void* cache, const void* q, void* turned, i64 tokens, i64 latent,
                                 i64 rotary, i64 heads, i64 q_token, i64 q_head, i64 half, float eps, void* stream) {
    return (half ? start_write<bf16> : start_write<float>)(kv, weight, cos, sin, slots, cache, q, turned, tokens,
                                                           latent, rotary, heads,
                                                          q_token, q_head, eps, stream);
}
