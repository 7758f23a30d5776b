// MoE layer: gather + grouped product + SwiGLU + product + weighted sum, forward and backward, without a cached
// activation.
//
// Layout (bf16 unless said): x, y, by_y (tokens, hidden); gate_up (experts, 2 * inner, hidden), gate first; down
//         (experts, hidden, inner); weights (tokens, chosen) float32; order (A) int32: assignment a = token * chosen +
//         k, sorted by expert; ends (experts) int32: where each expert's assignments end in that order. Rows "by place"
//         are in the sorted order, rows "by assignment" in the order of tokens, so that a token's sum reads neighbours
//         and needs no atomics.
// Limits: hidden and inner multiples of 8; at least sm_80; A at most 8 million (tiles of rows are the grid's y).
// Source: fused gather and no cached down-projection output as in SonicMoE (arXiv:2512.14080): the gradient of a weight
//         is <by_y down, activation>, so the down-projection's rows are not needed. Gate and up are computed again in
//         the backward.
// Tiles of 128 x 128 (32 x 128 where experts have few tokens) with mma.sync, four stages of cp.async; a block finds its
// expert from `ends`, so the host never waits.
#include "device.cuh"

namespace {

constexpr int block = 256, tile_k = 32, stages = 4, pad = 8;
constexpr int warps_m = 2, warps_n = 4;  // a warp computes m_tiles * 16 rows x n_tiles * 8 columns

template <int m_tiles> constexpr int tile_m = warps_m * m_tiles * 16;
constexpr int many = 4, few = 1;  // m_tiles: 128 rows for training, 32 for a decode step with few tokens per expert

// elements of one stage; the other orientation, 32 x 136, is smaller
constexpr int operand_size = 128 * (tile_k + pad);
template <int n_tiles> constexpr int tile_n = warps_n * n_tiles * 8;
constexpr size_t product_bytes = static_cast<size_t>(stages) * 2 * operand_size * sizeof(bf16);

template <int m_tiles, int n_tiles> struct Sums {
    float at[m_tiles][n_tiles][4];
    DEVICE void clear() {
        UNROLL for (int m = 0; m < m_tiles; ++m)
            UNROLL for (int n = 0; n < n_tiles; ++n)
                UNROLL for (int j = 0; j < 4; ++j) at[m][n][j] = 0.0f;
    }
};

// sums += A B over `depth`. `a_by_k`: A is stored with k as the fast index, a(i, k) gives the address of 8 neighbours
// in k; otherwise a(k, i) gives 8 neighbours in i. The same for b. A null address stands for zeros.
template <bool a_by_k, bool b_by_k, int m_tiles, int n_tiles, class A, class B>
DEVICE void product(Sums<m_tiles, n_tiles>& sums, int depth, A a, B b, bf16* memory) {
    constexpr int width_m = tile_m<m_tiles>, width_n = tile_n<n_tiles>;
    constexpr int a_stride = a_by_k ? tile_k + pad : width_m + pad, b_stride = b_by_k ? tile_k + pad : width_n + pad;
    constexpr int stage_size = 2 * operand_size;
    auto fetch = [&](int step) {
        bf16* a_tile = memory + step % stages * stage_size;
        bf16* b_tile = a_tile + operand_size;
        int k = step * tile_k;
        if (k < depth) {
            constexpr int a_chunks = a_by_k ? tile_k / 8 : width_m / 8, b_chunks = b_by_k ? tile_k / 8 : width_n / 8;
            UNROLL for (int i = thread(); i < width_m * tile_k / 8; i += block) {
                int row = i / a_chunks, column = i % a_chunks * 8;
                bool inside = (a_by_k ? k + column : k + row) < depth;
                const bf16* from = !inside ? nullptr : a_by_k ? a(row, k + column) : a(k + row, column);
                copy_async(a_tile + row * a_stride + column, from);
            }
            UNROLL for (int i = thread(); i < width_n * tile_k / 8; i += block) {
                int row = i / b_chunks, column = i % b_chunks * 8;
                bool inside = (b_by_k ? k + column : k + row) < depth;
                const bf16* from = !inside ? nullptr : b_by_k ? b(row, k + column) : b(k + row, column);
                copy_async(b_tile + row * b_stride + column, from);
            }
        }
        copies_commit();  // also when empty: the waits count groups
    };
    int m0 = warp() / warps_n * m_tiles * 16, n0 = warp() % warps_n * n_tiles * 8, tile = lane() / 8;
    int steps = (depth + tile_k - 1) / tile_k;
    for (int step = 0; step < stages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        copies_wait<stages - 2>();
        barrier();  // this stage has arrived, and the one fetched into next has been used up
        fetch(step + stages - 1);
        const bf16* a_tile = memory + step % stages * stage_size;
        const bf16* b_tile = a_tile + operand_size;
        UNROLL for (int k = 0; k < tile_k; k += 16) {
            uint32_t left[m_tiles][4], right[4];
            UNROLL for (int m = 0; m < m_tiles; ++m) {
                int at = m0 + m * 16;
                if constexpr (a_by_k)
                    load_tiles<false>(left[m], a_tile + (at + lane() % 16) * a_stride + k + lane() / 16 * 8);
                else load_tiles<true>(left[m], a_tile + (k + tile / 2 * 8 + lane() % 8) * a_stride + at + tile % 2 * 8);
            }
            UNROLL for (int n = 0; n < n_tiles; n += 2) {
                int at = n0 + n * 8;
                if constexpr (b_by_k)
                    load_tiles<false>(right, b_tile + (at + tile / 2 * 8 + lane() % 8) * b_stride + k + tile % 2 * 8);
                else load_tiles<true>(right, b_tile + (k + lane() % 16) * b_stride + at + lane() / 16 * 8);
                UNROLL for (int m = 0; m < m_tiles; ++m) {
                    multiply_add(sums.at[m][n], left[m], right[0], right[1]);
                    multiply_add(sums.at[m][n + 1], left[m], right[2], right[3]);
                }
            }
        }
    }
    barrier();  // the stages are free for other use; every group that was not empty has been waited for
}

// Calls f(row in the tile, column in the tile, sum m, n, half) for the pairs of neighbours that this lane holds.
template <int m_tiles, int n_tiles, class F> DEVICE void for_pairs(F f) {
    UNROLL for (int m = 0; m < m_tiles; ++m)
        UNROLL for (int half = 0; half < 2; ++half)
            UNROLL for (int n = 0; n < n_tiles; ++n)
                f(warp() / warps_n * m_tiles * 16 + m * 16 + half * 8 + lane() / 4,
                  warp() % warps_n * n_tiles * 8 + n * 8 + lane() % 4 * 2, m, n, half);
}

struct Rows { int expert, begin, count; };  // neighbouring places of one expert; count 0: nothing to do

// The block_y()-th tile of `height` rows. Every lane of every warp finds the same.
DEVICE Rows rows_of_block(const int* ends, int experts, int height) {
    int slot = block_y(), before = 0;
    for (int base = 0; base < experts; base += 32) {
        int e = base + lane();
        int end = e < experts ? ends[e] : 0, begin = e < experts && e > 0 ? ends[e - 1] : 0;
        int tiles = e < experts ? (end - begin + height - 1) / height : 0, up_to = tiles;
        UNROLL for (int step = 1; step < 32; step *= 2) {
            int other = from_lane(up_to, lane() - step & 31);
            if (lane() >= step) up_to += other;
        }
        unsigned reached = lanes_where(slot < before + up_to);
        if (reached) {
            int owner = 0;
            while (!(reached >> owner & 1)) ++owner;
            int first = from_lane(begin, owner) + (slot - before - from_lane(up_to - tiles, owner)) * height;
            int left = from_lane(end, owner) - first;
            return {base + owner, first, left < height ? left : height};
        }
        before += from_lane(up_to, 31);
    }
    return {0, 0, 0};
}

struct Origin { const int *assignment, *token; };  // of each row of the tile

// In shared memory behind the product's stages: the product asks for them again at every step.
DEVICE Origin origin_of(Rows rows, const int* order, int chosen) {
    int* assignments = reinterpret_cast<int*>(shared_memory() + product_bytes);
    int* tokens = assignments + tile_m<many>;
    for (int i = thread(); i < rows.count; i += block)
        assignments[i] = order[rows.begin + i], tokens[i] = assignments[i] / chosen;
    barrier();
    return {assignments, tokens};
}

// Gate and up of 64 columns, interleaved so that one lane holds both of a column: tiles n and n + 2 of its four.
DEVICE const bf16* gate_up_row(const bf16* gate_up, int i, int first, int inner, int hidden) {
    int column = first + i / 32 * 16 + i % 16;
    if (column >= inner) return nullptr;
    return gate_up + static_cast<i64>(i % 32 < 16 ? column : inner + column) * hidden;
}
DEVICE const bf16* offset(const bf16* row, int by) { return row ? row + by : nullptr; }

// activation (A, inner) by place = silu(x gate) * (x up)
template <int m_tiles>
KERNEL(block) up(const bf16* x, const bf16* gate_up, const int* order, const int* ends, bf16* activation, int experts,
                 int hidden, int inner, int chosen) {
    Rows rows = rows_of_block(ends, experts, tile_m<m_tiles>);
    if (rows.count == 0) return;
    Origin origin = origin_of(rows, order, chosen);
    const bf16* matrix = gate_up + static_cast<i64>(rows.expert) * 2 * inner * hidden;
    int first = block_x() * 64;
    Sums<m_tiles, 4> sums;
    sums.clear();
    product<true, true>(
        sums, hidden,
        [&](int i, int k) { return i < rows.count ? x + static_cast<i64>(origin.token[i]) * hidden + k : nullptr; },
        [&](int j, int k) { return offset(gate_up_row(matrix, j, first, inner, hidden), k); },
        reinterpret_cast<bf16*>(shared_memory()));
    for_pairs<m_tiles, 2>([&](int row, int column, int m, int n, int half) {
        if (row >= rows.count || first + column >= inner) return;
        float gate0 = sums.at[m][n][half * 2], gate1 = sums.at[m][n][half * 2 + 1];
        store_vector(activation + static_cast<i64>(rows.begin + row) * inner + first + column,
                     pack(gate0 * sigmoid(gate0) * sums.at[m][n + 2][half * 2],
                          gate1 * sigmoid(gate1) * sums.at[m][n + 2][half * 2 + 1]));
    });
}

// out (A, width) by assignment = in (A, depth) by place times the expert's matrix: (width, depth) if by_k, else (depth,
// width).
template <bool by_k, int m_tiles>
KERNEL(block) back(const bf16* in, const bf16* matrices, const int* order, const int* ends, bf16* out, int experts,
                   int depth, int width) {
    Rows rows = rows_of_block(ends, experts, tile_m<m_tiles>);
    if (rows.count == 0) return;
    Origin origin = origin_of(rows, order, 1);
    const bf16* matrix = matrices + static_cast<i64>(rows.expert) * width * depth;
    int first = block_x() * 128;
    Sums<m_tiles, 4> sums;
    sums.clear();
    product<true, by_k>(
        sums, depth,
        [&](int i, int k) { return i < rows.count ? in + static_cast<i64>(rows.begin + i) * depth + k : nullptr; },
        [&](int p, int q) -> const bf16* {
            if (first + (by_k ? p : q) >= width) return nullptr;
            return by_k ? matrix + static_cast<i64>(first + p) * depth + q
                        : matrix + static_cast<i64>(p) * width + first + q;
        },
        reinterpret_cast<bf16*>(shared_memory()));
    for_pairs<m_tiles, 4>([&](int row, int column, int m, int n, int half) {
        if (row < rows.count && first + column < width)
            store_vector(out + static_cast<i64>(origin.assignment[row]) * width + first + column,
                         pack(sums.at[m][n][half * 2], sums.at[m][n][half * 2 + 1]));
    });
}

// By place: gate and up again, by_activation = by_y down; from them d_gate_up (A, 2 inner), weighted (A, inner) =
// weight * activation, and by assignment the part of this tile of columns in d_weight: by_weight (A, column tiles)
// float32.
KERNEL(block) activation_gradient(const bf16* x, const bf16* gate_up, const bf16* down, const bf16* by_y,
                                  const float* weights, const int* order, const int* ends, bf16* d_gate_up,
                                  bf16* weighted, float* by_weight, int experts, int hidden, int inner, int chosen) {
    Rows rows = rows_of_block(ends, experts, tile_m<many>);
    if (rows.count == 0) return;
    Origin origin = origin_of(rows, order, chosen);
    const bf16* matrix = gate_up + static_cast<i64>(rows.expert) * 2 * inner * hidden;
    const bf16* down_matrix = down + static_cast<i64>(rows.expert) * hidden * inner;
    bf16* memory = reinterpret_cast<bf16*>(shared_memory());
    int first = block_x() * 64;
    auto row_of = [&](const bf16* of) {
        return [=, &rows](int i, int k) {
            return i < rows.count ? of + static_cast<i64>(origin.token[i]) * hidden + k : nullptr;
        };
    };
    Sums<many, 4> pre;
    pre.clear();
    product<true, true>(
        pre, hidden, row_of(x),
        [&](int j, int k) { return offset(gate_up_row(matrix, j, first, inner, hidden), k); }, memory);
    Sums<many, 2> by;
    by.clear();
    product<true, false>(
        by, hidden, row_of(by_y),
        [&](int k, int j) {
            return first + j < inner ? down_matrix + static_cast<i64>(k) * inner + first + j : nullptr;
        },
        memory);

    float* parts = reinterpret_cast<float*>(memory);  // (rows, warps_n): each warp's share of the rows' dot products
    UNROLL for (int m = 0; m < many; ++m)
        UNROLL for (int half = 0; half < 2; ++half) {
            int row = warp() / warps_n * many * 16 + m * 16 + half * 8 + lane() / 4;
            bool exists = row < rows.count;
            float weight = exists ? weights[origin.assignment[row]] : 0.0f, dot = 0.0f;
            UNROLL for (int n = 0; n < 2; ++n) {
                int column = first + warp() % warps_n * 16 + n * 8 + lane() % 4 * 2;
                float d_gate[2], d_up[2], kept[2];
                UNROLL for (int j = 0; j < 2; ++j) {
                    float gate = pre.at[m][n][half * 2 + j], upper = pre.at[m][n + 2][half * 2 + j];
                    float g = by.at[m][n][half * 2 + j];
                    float s = sigmoid(gate), activation = gate * s * upper;
                    dot += g * activation;  // columns past `inner` were zeros in every factor
                    d_gate[j] = weight * g * upper * s * (1.0f + gate * (1.0f - s));
                    d_up[j] = weight * g * gate * s;
                    kept[j] = weight * activation;
                }
                if (!exists || column >= inner) continue;
                i64 place = rows.begin + row;
                store_vector(d_gate_up + place * 2 * inner + column, pack(d_gate[0], d_gate[1]));
                store_vector(d_gate_up + place * 2 * inner + inner + column, pack(d_up[0], d_up[1]));
                store_vector(weighted + place * inner + column, pack(kept[0], kept[1]));
            }
            dot += from_lane_xor(dot, 1);
            dot += from_lane_xor(dot, 2);
            if (lane() % 4 == 0) parts[row * warps_n + warp() % warps_n] = dot;
        }
    barrier();
    for (int row = thread(); row < rows.count; row += block) {
        float sum = 0.0f;
        UNROLL for (int w = 0; w < warps_n; ++w) sum += parts[row * warps_n + w];
        by_weight[static_cast<i64>(origin.assignment[row]) * blocks_x() + block_x()] = sum;
    }
}

// out (experts, rows, columns) = sum over an expert's places of left^T right. The side named `gathered` is a matrix by
// token.
template <bool left_gathered>
KERNEL(block) matrix_gradient(const bf16* left, const bf16* right, const int* order, const int* ends, bf16* out,
                              int rows, int columns, int chosen) {
    int expert = block_z(), begin = expert ? ends[expert - 1] : 0, depth = ends[expert] - begin;
    int first_row = block_y() * tile_m<many>, first_column = block_x() * 128;
    auto address = [&](const bf16* of, bool gathered, int k, int column, int width) -> const bf16* {
        if (column >= width) return nullptr;
        return of + static_cast<i64>(gathered ? order[begin + k] / chosen : begin + k) * width + column;
    };
    Sums<many, 4> sums;
    sums.clear();
    product<false, false>(
        sums, depth, [&](int k, int i) { return address(left, left_gathered, k, first_row + i, rows); },
        [&](int k, int j) { return address(right, !left_gathered, k, first_column + j, columns); },
        reinterpret_cast<bf16*>(shared_memory()));
    for_pairs<many, 4>([&](int row, int column, int m, int n, int half) {
        if (first_row + row < rows && first_column + column < columns)
            store_vector(out + (static_cast<i64>(expert) * rows + first_row + row) * columns + first_column + column,
                         pack(sums.at[m][n][half * 2], sums.at[m][n][half * 2 + 1]));
    });
}

// y (tokens, hidden) = sum over k of weight * rows[token * chosen + k]; weights null: plain sum.
KERNEL(block) sum_rows(const bf16* rows, const float* weights, bf16* y, i64 tokens, int hidden, int chosen) {
    int chunks = hidden / 8;
    i64 first = static_cast<i64>(block_x()) * block + thread(), step = static_cast<i64>(blocks_x()) * block;
    for (i64 i = first; i < tokens * chunks; i += step) {
        i64 token = i / chunks;
        int column = static_cast<int>(i % chunks) * 8;
        float sum[8] = {}, value[8];
        for (int k = 0; k < chosen; ++k) {
            float weight = weights ? weights[token * chosen + k] : 1.0f;
            load_eight(rows + (token * chosen + k) * hidden + column, value, 8, true);
            UNROLL for (int j = 0; j < 8; ++j) sum[j] += weight * value[j];
        }
        store_eight(y + token * hidden + column, sum, 8, true);
    }
}

constexpr size_t shared_bytes = product_bytes + 2 * tile_m<many> * sizeof(int);

int over(i64 size, i64 tile) { return static_cast<int>((size + tile - 1) / tile); }
// No fewer than there can be: every expert may end in a tile that is not full.
int row_tiles(i64 assignments, i64 experts, int height) {
    return static_cast<int>(assignments / height + (experts < assignments ? experts : assignments));
}

int sum_into(const bf16* rows, const float* weights, bf16* y, i64 tokens, i64 hidden, i64 chosen, void* stream) {
    int wanted = over(tokens * (hidden / 8), block);
    return launch(sum_rows, {wanted < 1056 ? wanted : 1056}, block, 0, stream, rows, weights, y, tokens, hidden,
                  chosen);
}

}  // namespace

// Scratch: activation (A, inner), rows (A, hidden).
extern "C" int experts_forward(const bf16* x, const float* weights, const int* order, const int* ends,
                               const bf16* gate_up, const bf16* down, bf16* activation, bf16* rows, bf16* y,
                               i64 tokens, i64 chosen, i64 experts, i64 hidden, i64 inner, void* stream) {
    bool sparse = tokens * chosen < 32 * experts;
    int tiles = row_tiles(tokens * chosen, experts, sparse ? tile_m<few> : tile_m<many>);
    int code = launch(sparse ? up<few> : up<many>, {over(inner, 64), tiles}, block, shared_bytes, stream, x, gate_up,
                      order, ends, activation, experts, hidden, inner, chosen);
    if (code) return code;
    code = launch(sparse ? back<true, few> : back<true, many>, {over(hidden, 128), tiles}, block, shared_bytes, stream,
                  activation, down, order, ends, rows, experts, inner, hidden);
    return code ? code : sum_into(rows, weights, y, tokens, hidden, chosen, stream);
}

// Scratch: d_pre (A, 2 inner), weighted (A, inner), rows (A, hidden). by_weight (A, ceil(inner / 64)) is summed by the
// caller.
extern "C" int experts_backward(const bf16* x, const float* weights, const int* order, const int* ends,
                                const bf16* gate_up, const bf16* down, const bf16* by_y, bf16* d_pre, bf16* weighted,
                                bf16* rows, bf16* d_x,
                                float* by_weight, bf16* d_gate_up, bf16* d_down, i64 tokens, i64 chosen, i64 experts,
                                i64 hidden, i64 inner, void* stream) {
    int tiles = row_tiles(tokens * chosen, experts, tile_m<many>), all = static_cast<int>(experts);
    int code = launch(activation_gradient, {over(inner, 64), tiles}, block, shared_bytes, stream, x, gate_up, down,
                      by_y, weights, order, ends, d_pre, weighted, by_weight, experts, hidden, inner, chosen);
    if (!code) code = launch(back<false, many>, {over(hidden, 128), tiles}, block, shared_bytes, stream, d_pre,
                             gate_up, order, ends, rows, experts, 2 * inner, hidden);
    if (!code) code = sum_into(rows, nullptr, d_x, tokens, hidden, chosen, stream);
    if (!code) code = launch(matrix_gradient<false>, {over(hidden, 128), over(2 * inner, tile_m<many>), all}, block,
                             product_bytes, stream, d_pre, x, order, ends, d_gate_up, 2 * inner, hidden, chosen);
    if (!code) code = launch(matrix_gradient<true>, {over(inner, 128), over(hidden, tile_m<many>), all}, block,
                             product_bytes, stream, by_y, weighted, order, ends, d_down, hidden, inner, chosen);
    return code;
}
