// MLA decode: a few queries of few heads over a paged latent cache, split over the tokens, and the combine of the
// splits.
//
// Layout: q (batch, queries, heads, width) bf16, width = latent + rotary, absorbed: already in the space of the latent;
//         cache (pages, page, width) bf16: keys are whole rows, values their first `latent` numbers; table (batch,
//         table_width) int32: the pages of each sequence; lengths (batch) int32: cached tokens, the queries' own
//         included; out (batch, queries, heads, latent) bf16; partial (splits, batch * rows, latent) and partial_lse
//         (splits, batch * rows) float32, rows = queries * heads. Query s of S sees the tokens before length - S + s +
//         1.
// Limits: latent 128, 256 or 512; rotary a multiple of 32; queries * heads at most 64; sm_80 or newer.
// Source: DeepSeek-V2 (arXiv:2405.04434), absorbed form; flash-decoding splits (Dao et al. 2023). With so few rows the
//         time is that of reading the cache, so plain mma.sync tiles suffice, and p is multiplied as two bf16 numbers
//         (high and low part): the result is float32's, at a price that hides behind the memory.
// Bytes that must move: 2 * width per cached token; a tile of them is in flight while the one before is worked on.
#include "device.cuh"

namespace {

constexpr int block = 256, warps = 8, pad = 8;  // `pad` keeps the eight rows of a tile load in different banks

template <int row_tiles> struct Sizes {
    static constexpr int rows = 16 * row_tiles, tokens = row_tiles <= 2 ? 64 : 32;
    static constexpr size_t bytes(int width) {
        return (static_cast<size_t>(rows + 2 * tokens) * (width + pad) + 2 * rows * (tokens + pad)) * sizeof(bf16) +
               (rows * (tokens + 4) + 3 * rows) * sizeof(float);
    }
};

template <int latent, int row_tiles>
KERNEL(block) attend(const bf16* q, const bf16* cache, const int* table, const int* lengths, bf16* out, float* partial,
                     float* partial_lse, int queries, int heads, int width, int page, int table_width, int splits,
                     float scale) {
    using S = Sizes<row_tiles>;
    constexpr int column_tiles = latent / 8 / warps;  // of 8 columns, per warp
    static_assert(column_tiles % 2 == 0, "values are loaded two column tiles at a time");
    int split = block_x(), sequence = block_y(), rows = queries * heads, stride = width + pad;
    bf16* q_tile = reinterpret_cast<bf16*>(shared_memory());
    bf16* kv_tiles = q_tile + S::rows * stride;
    bf16* high = kv_tiles + 2 * S::tokens * stride;
    bf16* low = high + S::rows * (S::tokens + pad);
    float* scores = reinterpret_cast<float*>(low + S::rows * (S::tokens + pad));
    constexpr int score_stride = S::tokens + 4;
    float* row_max = scores + S::rows * score_stride;
    float* row_sum = row_max + S::rows;
    float* row_factor = row_sum + S::rows;

    int length = lengths[sequence];
    int share = ((length + splits - 1) / splits + S::tokens - 1) / S::tokens * S::tokens;
    int begin = split * share, end = begin + share < length ? begin + share : length;
    const int* pages = table + static_cast<i64>(sequence) * table_width;

    // the rows of S::tokens tokens; zeros past the end, as 0 * garbage could be NaN
    auto fetch = [&](int first, bf16* tile) {
        int chunks = width / 8;
        for (int i = thread(); i < S::tokens * chunks; i += block) {
            int token = first + i / chunks, column = i % chunks * 8;
            const bf16* from = nullptr;
            if (token < end)
                from = cache + (static_cast<i64>(pages[token / page]) * page + token % page) * width + column;
            copy_async(tile + i / chunks * stride + column, from);
        }
        copies_commit();
    };

    for (int i = thread(); i < S::rows * (width / 8); i += block) {
        int row = i / (width / 8), column = i % (width / 8) * 8;
        const bf16* from = row < rows ? q + (static_cast<i64>(sequence) * rows + row) * width + column : nullptr;
        copy_async(q_tile + row * stride + column, from);
    }
    for (int row = thread(); row < S::rows; row += block) row_max[row] = minus_infinity, row_sum[row] = 0.0f;
    float sums[row_tiles][column_tiles][4];
    UNROLL for (int m = 0; m < row_tiles; ++m)
        UNROLL for (int n = 0; n < column_tiles; ++n)
            UNROLL for (int j = 0; j < 4; ++j) sums[m][n][j] = 0.0f;

    int first_column = warp() * column_tiles * 8, g = lane() / 4, t = lane() % 4;
    if (begin < end) fetch(begin, kv_tiles);
    int turn = 0;
    for (int first = begin; first < end; first += S::tokens, turn ^= 1) {
        bf16* kv = kv_tiles + turn * S::tokens * stride;
        if (first + S::tokens < end) {
            fetch(first + S::tokens, kv_tiles + (turn ^ 1) * S::tokens * stride);
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        barrier();

        // Scores: a warp takes 8 tokens and one or two tiles of 16 rows. Two sums each (even and odd steps of k) and two
        // tiles keep up to four products in flight, as each waits for the one before it in its own sum.
        constexpr int token_tiles = S::tokens / 8, tiles_each = row_tiles * token_tiles / warps;
        int n = warp() % token_tiles, first_m = warp() / token_tiles * tiles_each;
        float c[tiles_each][2][4] = {};
        const bf16* b_row = kv + (n * 8 + lane() % 8) * stride + lane() / 8 * 8;
        for (int k = 0; k < width; k += 32) {
            uint32_t b[4];
            load_tiles<false>(b, b_row + k);
            UNROLL for (int m = 0; m < tiles_each; ++m) {
                const bf16* a_row = q_tile + ((first_m + m) * 16 + lane() % 16) * stride + lane() / 16 * 8 + k;
                uint32_t a[2][4];
                load_tiles<false>(a[0], a_row);
                load_tiles<false>(a[1], a_row + 16);
                multiply_add(c[m][0], a[0], b[0], b[1]);
                multiply_add(c[m][1], a[1], b[2], b[3]);
            }
        }
        UNROLL for (int m = 0; m < tiles_each; ++m)
            UNROLL for (int j = 0; j < 4; ++j) {
                int row = (first_m + m) * 16 + g + j / 2 * 8, token = n * 8 + 2 * t + j % 2;
                bool seen = first + token < length - queries + row / heads + 1 && first + token < end;
                float score = (c[m][0][j] + c[m][1][j]) * (scale * log2e);
                scores[row * score_stride + token] = seen ? score : minus_infinity;
            }
        barrier();

        for (int row = warp(); row < S::rows; row += warps) {  // online softmax, in powers of two
            constexpr int per_lane = S::tokens / 32;
            float x[per_lane], best = minus_infinity, sum = 0.0f;
            UNROLL for (int i = 0; i < per_lane; ++i) {
                x[i] = scores[row * score_stride + i * 32 + lane()];
                best = x[i] > best ? x[i] : best;
            }
            float before = row_max[row], after = warp_max(best);
            after = before > after ? before : after;
            UNROLL for (int i = 0; i < per_lane; ++i) {
                float p = x[i] == minus_infinity ? 0.0f : exp2_fast(x[i] - after);
                bf16 top = from_float<bf16>(p);
                high[row * (S::tokens + pad) + i * 32 + lane()] = top;
                low[row * (S::tokens + pad) + i * 32 + lane()] = from_float<bf16>(p - to_float(top));
                sum += p;
            }
            sum = warp_sum(sum);
            if (lane() == 0) {
                float factor = before == minus_infinity ? 0.0f : exp2_fast(before - after);
                row_factor[row] = factor, row_max[row] = after, row_sum[row] = row_sum[row] * factor + sum;
            }
        }
        barrier();

        UNROLL for (int m = 0; m < row_tiles; ++m) {
            float upper = row_factor[m * 16 + g], lower = row_factor[m * 16 + g + 8];
            UNROLL for (int n = 0; n < column_tiles; ++n) {
                sums[m][n][0] *= upper, sums[m][n][1] *= upper;
                sums[m][n][2] *= lower, sums[m][n][3] *= lower;
            }
        }
        UNROLL for (int k = 0; k < S::tokens; k += 16) {
            uint32_t a_high[row_tiles][4], a_low[row_tiles][4];
            UNROLL for (int m = 0; m < row_tiles; ++m) {
                int at = (m * 16 + lane() % 16) * (S::tokens + pad) + k + lane() / 16 * 8;
                load_tiles<false>(a_high[m], high + at);
                load_tiles<false>(a_low[m], low + at);
            }
            UNROLL for (int n = 0; n < column_tiles; n += 2) {
                uint32_t b[4];
                load_tiles<true>(b, kv + (k + lane() % 16) * stride + first_column + n * 8 + lane() / 16 * 8);
                UNROLL for (int m = 0; m < row_tiles; ++m) {
                    multiply_add(sums[m][n], a_high[m], b[0], b[1]);
                    multiply_add(sums[m][n], a_low[m], b[0], b[1]);
                    multiply_add(sums[m][n + 1], a_high[m], b[2], b[3]);
                    multiply_add(sums[m][n + 1], a_low[m], b[2], b[3]);
                }
            }
        }
        barrier();  // the next turn fetches into this one's buffer
    }
    copies_wait<0>();  // the queries' of a split without tokens: a copy must not outlive its block
    barrier();

    i64 all_rows = static_cast<i64>(blocks_y()) * rows;
    UNROLL for (int m = 0; m < row_tiles; ++m)
        UNROLL for (int half = 0; half < 2; ++half) {
            int row = m * 16 + g + half * 8;
            if (row >= rows) continue;
            float sum = row_sum[row], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            i64 at = static_cast<i64>(sequence) * rows + row;
            UNROLL for (int n = 0; n < column_tiles; ++n) {
                float x = sums[m][n][half * 2] * inverse, y = sums[m][n][half * 2 + 1] * inverse;
                int column = first_column + n * 8 + 2 * t;
                if (splits == 1) {
                    store_vector(out + at * latent + column, pack(x, y));
                } else {
                    float* to = partial + (split * all_rows + at) * latent + column;
                    to[0] = x, to[1] = y;
                }
            }
            if (splits > 1 && warp() == 0 && t == 0)
                partial_lse[split * all_rows + at] = row_max[row] + log_of(sum) * log2e;
        }
}

// out = sum over splits of partial * 2^lse / sum of 2^lse; a split that saw no token has lse -inf.
KERNEL(128) combine(const float* partial, const float* partial_lse, bf16* out, int splits, i64 rows, int latent) {
    i64 row = block_x();
    float best = minus_infinity, total = 0.0f;
    for (int s = 0; s < splits; ++s) {
        float lse = partial_lse[s * rows + row];
        best = lse > best ? lse : best;
    }
    for (int s = 0; s < splits; ++s) {
        float lse = partial_lse[s * rows + row];
        if (lse != minus_infinity) total += exp2_fast(lse - best);
    }
    for (int column = thread(); column < latent; column += 128) {
        float sum = 0.0f;
        for (int s = 0; s < splits; ++s) {
            float lse = partial_lse[s * rows + row];
            if (lse != minus_infinity) sum += exp2_fast(lse - best) * partial[(s * rows + row) * latent + column];
        }
        out[row * latent + column] = from_float<bf16>(total == 0.0f ? 0.0f : sum / total);
    }
}

}  // namespace

extern "C" int decode_attend(const bf16* q, const bf16* cache, const int* table, const int* lengths, bf16* out,
                             float* partial, float* partial_lse, i64 batch, i64 queries, i64 heads, i64 width,
                             i64 latent, i64 page, i64 table_width, i64 splits, float scale, void* stream) {
    i64 rows = queries * heads;
    auto start = [&](auto kernel, size_t bytes) {
        return launch(kernel, {static_cast<int>(splits), static_cast<int>(batch)}, block, bytes, stream, q, cache,
                      table, lengths, out, partial, partial_lse, queries, heads, width, page, table_width, splits,
                      scale);
    };
    int code = -1;
#define FOR_LATENT(size)                                                              \
    if (latent == size)                                                               \
        code = rows <= 16   ? start(attend<size, 1>, Sizes<1>::bytes(width))          \
               : rows <= 32 ? start(attend<size, 2>, Sizes<2>::bytes(width))          \
                            : start(attend<size, 4>, Sizes<4>::bytes(width));
    FOR_LATENT(128)
    FOR_LATENT(256)
    FOR_LATENT(512)
#undef FOR_LATENT
    if (code || splits == 1) return code;
    return launch(combine, {static_cast<int>(batch * rows)}, 128, 0, stream, partial, partial_lse, out, splits,
                  batch * rows, latent);
}
