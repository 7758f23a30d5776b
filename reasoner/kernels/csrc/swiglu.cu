// SwiGLU: y = silu(gate) * up, and its gradient.
//
// Layout: gate_up (rows, 2 * width), gate first; y (rows, width); one type, float32 or bf16; float32 inside, rounded
// once. Limits: rows * 2 * width below 2^62; nothing else.
// Source: Shazeer 2020 (arXiv:2002.05202).
#include "device.cuh"

namespace {

constexpr int block = 256;

template <class T>
KERNEL(block) forward(const T* gate_up, T* y, i64 rows, int width) {
    int per_row = (width + 7) / 8;
    bool vectors = width % 8 == 0;
    i64 start = static_cast<i64>(block_x()) * block + thread(), step = static_cast<i64>(blocks_x()) * block;
    for (i64 i = start; i < rows * per_row; i += step) {
        i64 row = i / per_row;
        int first = static_cast<int>(i % per_row) * 8;
        const T* line = gate_up + row * 2 * width + first;
        float gate[8], up[8];
        load_eight(line, gate, width - first, vectors);
        load_eight(line + width, up, width - first, vectors);
        UNROLL for (int j = 0; j < 8; ++j) up[j] *= gate[j] * sigmoid(gate[j]);
        store_eight(y + row * width + first, up, width - first, vectors);
    }
}

// With s = sigmoid(g):  d gate = dy up s (1 + g (1 - s)),  d up = dy g s.
template <class T>
KERNEL(block) backward(const T* gate_up, const T* by_y, T* d_gate_up, i64 rows, int width) {
    int per_row = (width + 7) / 8;
    bool vectors = width % 8 == 0;
    i64 start = static_cast<i64>(block_x()) * block + thread(), step = static_cast<i64>(blocks_x()) * block;
    for (i64 i = start; i < rows * per_row; i += step) {
        i64 row = i / per_row;
        int first = static_cast<int>(i % per_row) * 8;
        i64 at = row * 2 * width + first;
        float gate[8], up[8], by[8];
        load_eight(gate_up + at, gate, width - first, vectors);
        load_eight(gate_up + at + width, up, width - first, vectors);
        load_eight(by_y + row * width + first, by, width - first, vectors);
        UNROLL for (int j = 0; j < 8; ++j) {
            float s = sigmoid(gate[j]), d_up = by[j] * gate[j] * s;
            gate[j] = by[j] * up[j] * s * (1.0f + gate[j] * (1.0f - s));
            up[j] = d_up;
        }
        store_eight(d_gate_up + at, gate, width - first, vectors);
        store_eight(d_gate_up + at + width, up, width - first, vectors);
    }
}

Grid grid_for(i64 rows, i64 width) {
    i64 wanted = (rows * ((width + 7) / 8) + block - 1) / block, most = 1056;  // 8 per multiprocessor
    return {static_cast<int>(wanted < most ? wanted : most)};
}

template <class T> int start(const void* gate_up, void* y, i64 rows, i64 width, void* stream) {
    return launch(forward<T>, grid_for(rows, width), block, 0, stream, static_cast<const T*>(gate_up),
                  static_cast<T*>(y), rows, width);
}
template <class T> int start_back(const void* gate_up, const void* by_y, void* d_gate_up, i64 rows, i64 width,
                                  void* stream) {
    return launch(backward<T>, grid_for(rows, width), block, 0, stream, static_cast<const T*>(gate_up),
                  static_cast<const T*>(by_y), static_cast<T*>(d_gate_up), rows, width);
}

}  // namespace

extern "C" int swiglu_forward(const void* gate_up, void* y, i64 rows, i64 width, i64 half, void* stream) {
    return (half ? start<bf16> : start<float>)(gate_up, y, rows, width, stream);
}
extern "C" int swiglu_backward(const void* gate_up, const void* by_y, void* d_gate_up, i64 rows, i64 width, i64 half,
                               void* stream) {
    return (half ? start_back<bf16> : start_back<float>)(gate_up, by_y, d_gate_up, rows, width, stream);
}
