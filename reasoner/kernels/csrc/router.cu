// MoE router: scores, group-limited top-k, weights and loads in one launch; its gradient; tokens sorted by expert.
//
// Layout: logits (tokens, experts) float32; bias (experts) float32; experts chosen (tokens, chosen) int64, best first;
//         weights (tokens, chosen) float32; load (experts) int32, zeroed by the caller.
//         order (A) int32: assignments sorted by expert, stable; place: its inverse; ends (experts) int32: where each
//         expert's end.
// Limits: at most 512 experts, 32 chosen, 32 groups that divide the experts; A = tokens * chosen below 2^31.
// Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2: sigmoid scores, a bias that only chooses, groups by their two
// best. A NaN score is chosen last, so indices are valid and distinct whatever the input.
#include "device.cuh"

namespace {

constexpr int block = 256, nobody = 1 << 30;

struct Best { float value; int index; };

DEVICE bool beats(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

DEVICE Best warp_best(Best best) {
    UNROLL for (int mask = 16; mask; mask >>= 1) {
        Best other{from_lane_xor(best.value, mask), from_lane_xor(best.index, mask)};
        if (beats(other, best)) best = other;
    }
    return best;
}

// One warp per token; lane l holds the experts l, l + 32, ...
template <int per_lane>
KERNEL(block) route(const float* logits, const float* bias, i64* chosen_out, float* weights, int* load, int tokens,
                    int experts, int chosen, int groups, int open_groups, int normalise, float scale) {
    int* counts = reinterpret_cast<int*>(shared_memory());
    for (int e = thread(); e < experts; e += block) counts[e] = 0;
    barrier();
    for (int token = block_x() * (block / 32) + warp(); token < tokens; token += blocks_x() * (block / 32)) {
        float score[per_lane], rank[per_lane];
        UNROLL for (int i = 0; i < per_lane; ++i) {
            int e = i * 32 + lane();
            score[i] = e < experts ? sigmoid(logits[static_cast<i64>(token) * experts + e]) : 0.0f;
            rank[i] = e < experts ? score[i] + bias[e] : minus_infinity;
            if (rank[i] != rank[i]) rank[i] = minus_infinity;
        }
        if (groups > 1) {
            int size = experts / groups;
            Best of_lane{minus_infinity, lane() < groups ? lane() : nobody};  // lane g keeps the score of group g
            for (int g = 0; g < groups; ++g) {
                float first = minus_infinity, second = minus_infinity;
                UNROLL for (int i = 0; i < per_lane; ++i) {
                    if ((i * 32 + lane()) / size != g) continue;
                    if (rank[i] > first) second = first, first = rank[i];
                    else if (rank[i] > second) second = rank[i];
                }
                UNROLL for (int mask = 16; mask; mask >>= 1) {
                    float other_first = from_lane_xor(first, mask), other_second = from_lane_xor(second, mask);
                    float low = first < other_first ? first : other_first;
                    first = first < other_first ? other_first : first;
                    second = second < other_second ? other_second : second;
                    second = second < low ? low : second;
                }
                if (lane() == g) of_lane.value = size > 1 ? first + second : first;
            }
            unsigned open = 0;
            for (int n = 0; n < open_groups; ++n) {
                bool taken = lane() < groups && (open >> lane() & 1);
                Best best = warp_best(taken ? Best{minus_infinity, nobody} : of_lane);
                open |= 1u << best.index;
            }
            UNROLL for (int i = 0; i < per_lane; ++i) {
                int e = i * 32 + lane();
                if (e < experts && !(open >> (e / size) & 1)) rank[i] = minus_infinity;
            }
        }
        unsigned taken = 0;  // bit i: expert i * 32 + lane
        float mine = 0.0f;
        int my_expert = 0;
        for (int k = 0; k < chosen; ++k) {
            Best best{minus_infinity, nobody};
            UNROLL for (int i = 0; i < per_lane; ++i) {
                int e = i * 32 + lane();
                Best candidate{rank[i], e};
                if (e < experts && !(taken >> i & 1) && beats(candidate, best)) best = candidate;
            }
            best = warp_best(best);
            float value = 0.0f;
            UNROLL for (int i = 0; i < per_lane; ++i)
                if (best.index == i * 32 + lane()) value = score[i], taken |= 1u << i;
            value = from_lane(value, best.index % 32);
            if (lane() == k) mine = value, my_expert = best.index;
        }
        float total = warp_sum(mine) + 1e-20f;
        if (lane() < chosen) {
            i64 at = static_cast<i64>(token) * chosen + lane();
            chosen_out[at] = my_expert;
            weights[at] = (normalise ? mine / total : mine) * scale;
            add_atomic(counts + my_expert, 1);
        }
    }
    barrier();
    for (int e = thread(); e < experts; e += block)
        if (counts[e]) add_atomic(load + e, counts[e]);
}

// d weight_k / d logit: w_k = c s_k / S, s = sigmoid(logit), S the sum over the chosen (1 where not normalised).
KERNEL(block) route_gradient(const float* logits, const i64* chosen_in, const float* by_weights, float* d_logits,
                             int tokens, int experts, int chosen, int normalise, float scale) {
    int token = block_x() * (block / 32) + warp();
    if (token >= tokens) return;
    float* line = d_logits + static_cast<i64>(token) * experts;
    for (int e = lane(); e < experts; e += 32) line[e] = 0.0f;
    bool mine = lane() < chosen;
    i64 at = static_cast<i64>(token) * chosen + lane();
    int expert = mine ? static_cast<int>(chosen_in[at]) : 0;
    float s = mine ? sigmoid(logits[static_cast<i64>(token) * experts + expert]) : 0.0f;
    float g = mine ? by_weights[at] * scale : 0.0f;
    if (normalise) {
        float total = warp_sum(s) + 1e-20f, mean = warp_sum(g * s) / total;
        g = (g - mean) / total;
    }
    warp_barrier();
    if (mine) line[expert] = g * s * (1.0f - s);
}

// One block per expert scans all assignments twice: who comes before its experts, then where each of its own goes. No
// atomics, so the order is always the same.
KERNEL(block) sort(const i64* chosen, int* order, int* place, int* ends, int assignments) {
    int expert = block_x();
    int* scratch = reinterpret_cast<int*>(shared_memory());
    int* totals = scratch + 33;
    int before = 0, own = 0;
    for (int a = thread(); a < assignments; a += block) before += chosen[a] < expert, own += chosen[a] == expert;
    before = block_sum(before, scratch);
    own = block_sum(own, scratch);
    if (thread() == 0) ends[expert] = before + own;
    for (int tile = 0; tile < assignments; tile += block) {
        int a = tile + thread();
        bool hit = a < assignments && chosen[a] == expert;
        unsigned hits = lanes_where(hit);
        if (lane() == 0) totals[warp()] = count_bits(hits);
        barrier();
        int at = before + count_bits(hits & ((1u << lane()) - 1));
        for (int w = 0; w < block / 32; ++w) {
            if (w < warp()) at += totals[w];
            before += totals[w];
        }
        if (hit) order[at] = a, place[a] = at;
        barrier();
    }
}

}  // namespace

extern "C" int router_route(const float* logits, const float* bias, i64* chosen_out, float* weights, int* load,
                            i64 tokens, i64 experts, i64 chosen, i64 groups, i64 open_groups, i64 normalise,
                            float scale, void* stream) {
    int per_lane = (static_cast<int>(experts) + 31) / 32;
    auto kernel = per_lane <= 1 ? route<1> : per_lane <= 2 ? route<2> : per_lane <= 4 ? route<4>
                  : per_lane <= 8 ? route<8> : route<16>;
    int wanted = (static_cast<int>(tokens) + block / 32 - 1) / (block / 32), most = 1056;  // 8 per multiprocessor
    return launch(kernel, {wanted < most ? wanted : most}, block, experts * sizeof(int), stream, logits, bias,
                  chosen_out, weights, load, tokens, experts, chosen, groups, open_groups, normalise, scale);
}
extern "C" int router_gradient(const float* logits, const i64* chosen_in, const float* by_weights, float* d_logits,
                               i64 tokens, i64 experts, i64 chosen, i64 normalise, float scale, void* stream) {
    return launch(route_gradient, {(static_cast<int>(tokens) + block / 32 - 1) / (block / 32)}, block, 0, stream,
                  logits, chosen_in, by_weights, d_logits, tokens, experts, chosen, normalise, scale);
}
extern "C" int router_sort(const i64* chosen, int* order, int* place, int* ends, i64 assignments, i64 experts,
                           void* stream) {
    return launch(sort, {static_cast<int>(experts)}, block, (33 + block / 32) * sizeof(int), stream, chosen, order,
                  place, ends, assignments);
}
