// Feed-forward networks (specification 2.7, 2.8): routing, and the experts over the tokens that were sent to them.
#pragma once

#include "decode/projections.h"
#include "decode/rotation.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Tokens grouped by expert. A slot is a token at an expert; slots of an expert are neighbours, experts rise, and those without a
// token are left out.
struct Routing {
    int32_t* active_count;
    int32_t* active;  // expert numbers
    int32_t* start;   // first slots; one more than there are active experts
    int32_t* token;   // of each slot
    float* weight;
    int32_t* chosen;  // (tokens, top_k) experts, before they are grouped
    float* chosen_weight;
    float* shared_weight;  // (tokens, shared)

    // `memory` has routing_elements(...) of room.
    Routing(float* memory, int64_t tokens, const FeedForward& network) {
        const int64_t experts = network.routed + network.shared, slots = tokens * network.experts_per_token();
        auto* numbers = reinterpret_cast<int32_t*>(memory);
        active_count = numbers;
        active = active_count + 1;
        start = active + experts;
        token = start + experts + 1;
        chosen = token + slots;
        auto* weights = reinterpret_cast<float*>(chosen + tokens * network.top_k);
        weight = weights;
        chosen_weight = weight + slots;
        shared_weight = chosen_weight + tokens * network.top_k;
    }
};

// The top_k experts of one token, likeliest first, the lower number first among equals; weights p / (sum of the chosen p + 1e-9).
// Behind the logits of the last expert stands -inf up to whole panels.
inline void choose_experts(const FeedForward& network, const float* logits, int32_t* chosen, float* weights) {
    const int64_t experts = network.routed, padded = panel_count(experts) * panel_width;
    float last_logit = __builtin_inff();
    int64_t last = -1;
    for (int64_t k = 0; k < network.top_k; ++k) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e) {
            const bool left = logits[e] < last_logit || (logits[e] == last_logit && e > last);
            if (left && (best < 0 || logits[e] > logits[best])) best = e;
        }
        if (best < 0) best = k;  // NaN compares with nothing; any expert will do, the weights are NaN
        chosen[k] = static_cast<int32_t>(best);
        last = best;
        last_logit = logits[best];
    }
    const Float highest = broadcast(logits[chosen[0]]);
    Float total = zero();
    for (int64_t e = 0; e < padded; e += Float::lanes) total = total + exp(load(logits + e) - highest);
    const float inverse = 1.0f / sum(total);
    float kept = 0.0f;
    alignas(64) float values[Float::lanes];
    for (int64_t k = 0; k < network.top_k; ++k) {
        store(values, exp(broadcast(logits[chosen[k]]) - highest));
        weights[k] = values[0] * inverse;
        kept += weights[k];
    }
    for (int64_t k = 0; k < network.top_k; ++k) weights[k] = weights[k] / (kept + 1e-9f) * network.routed_scale;
}

// How much of each shared expert a token takes.
inline void share_experts(const FeedForward& network, const float* logits, float* weights) {
    if (network.shared == 1) {
        weights[0] = network.shared_scale;
        return;
    }
    float highest = logits[0], total = 0.0f;
    for (int64_t n = 1; n < network.shared; ++n) highest = logits[n] > highest ? logits[n] : highest;
    for (int64_t n = 0; n < network.shared; ++n) total += weights[n] = expf(logits[n] - highest);
    for (int64_t n = 0; n < network.shared; ++n) weights[n] = weights[n] / total * network.shared_scale;
}

// Counting sort of all choices by expert; a token's place among those of an expert is its own.
inline void group_tokens(const FeedForward& network, int64_t tokens, const Routing& routing) {
    int32_t active = 0, slot = 0;
    const auto begin = [&](int64_t expert) {
        routing.active[active] = static_cast<int32_t>(expert);
        routing.start[active++] = slot;
    };
    const auto add = [&](int64_t token, float weight) {
        routing.token[slot] = static_cast<int32_t>(token);
        routing.weight[slot++] = weight;
    };
    const int64_t choices = tokens * network.top_k;
    if (tokens == 1) {
        // A few numbers, put in order by looking for the next one.
        int64_t last = -1;
        for (int64_t i = 0; i < choices; ++i) {
            int64_t next = -1;
            for (int64_t k = 0; k < choices; ++k)
                if (routing.chosen[k] > last && (next < 0 || routing.chosen[k] < routing.chosen[next])) next = k;
            if (next < 0) break;
            last = routing.chosen[next];
            begin(last);
            add(0, routing.chosen_weight[next]);
        }
    } else if (choices > 0) {
        // `start` counts the tokens of every expert, then says where they go.
        for (int64_t e = 0; e <= network.routed; ++e) routing.start[e] = 0;
        for (int64_t i = 0; i < choices; ++i) ++routing.start[routing.chosen[i] + 1];
        for (int64_t e = 0; e < network.routed; ++e) routing.start[e + 1] += routing.start[e];
        for (int64_t i = 0; i < choices; ++i) {
            const int32_t place = routing.start[routing.chosen[i]]++;
            routing.token[place] = static_cast<int32_t>(i / network.top_k);
            routing.weight[place] = routing.chosen_weight[i];
        }
        // Now start[e] is where expert e ends.
        for (int64_t e = 0; e < network.routed; ++e) {
            const int32_t end = routing.start[e];
            if (end == slot) continue;
            begin(e);
            slot = end;
        }
    }
    for (int64_t n = 0; n < network.shared; ++n) {
        begin(network.routed + n);
        for (int64_t t = 0; t < tokens; ++t) add(t, routing.shared_weight[t * network.shared + n]);
    }
    routing.start[active] = slot;
    *routing.active_count = active;
}

inline void router_logits(const Step& step, const Team& team, const FeedForward& network, const float* normed) {
    const Workspace& work = step.work;
    const int64_t width = step.model->width, gate_at = network.router.panels() * panel_width;
    const auto write = [&](int64_t at, int64_t outputs) {
        return [&work, at, outputs](const Sums& sums) {
            for (int r = 0; r < sums.rows; ++r) {
                float* target = work.router_logits + (sums.first_row + r) * work.router_width + at + sums.first_output();
                for (int i = 0; i < sums.panels * panel_width; ++i)
                    target[i] = sums.first_output() + i < outputs ? sums.row(r)[i] : -__builtin_inff();
            }
        };
    };
    const auto product = [&](const PackedMatrix& matrix, int64_t at) {
        const Rows rows = rows_for(matrix, work, team, normed, width, step.count);
        project(matrix, team.share(matrix.panels()), step.count, rows, in_order, write(at, matrix.outputs));
    };
    if (network.routed > 0) product(network.router, 0);
    if (network.shared > 1) product(network.shared_gate, gate_at);
}

inline void route(const Step& step, const FeedForward& network, const Routing& routing, Range tokens) {
    const Workspace& work = step.work;
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
        const float* logits = work.router_logits + t * work.router_width;
        if (network.routed > 0)
            choose_experts(network, logits, routing.chosen + t * network.top_k, routing.chosen_weight + t * network.top_k);
        if (network.shared > 0)
            share_experts(network, logits + network.router.panels() * panel_width,
                          routing.shared_weight + t * network.shared);
    }
}

// The hidden units of every slot. Threads share the panels of all active experts, weighed by what they cost: reading them, and the
// arithmetic of their tokens.
inline void first_halves(const Step& step, const Team& team, const FeedForward& network, const Routing& routing,
                         const float* normed) {
    const Workspace& work = step.work;
    const int64_t width = step.model->width, panels_per_unit = network.gated ? 2 : 1;
    const Rows rows = rows_for(network.experts[0].first, work, team, normed, width, step.count);
    constexpr int64_t cost_of_reading = 12;
    const auto cost = [&](int32_t a) { return cost_of_reading + routing.start[a + 1] - routing.start[a]; };
    const auto units = [&](int32_t a) { return panel_count(network.experts[routing.active[a]].width); };
    int64_t total = 0;
    for (int32_t a = 0; a < *routing.active_count; ++a) total += cost(a) * units(a);
    const Range mine = team.share(total);
    int64_t before = 0;
    for (int32_t a = 0; a < *routing.active_count; before += cost(a) * units(a), ++a) {
        const auto unit_at = [&](int64_t place) {
            const int64_t unit = place <= before ? 0 : (place - before + cost(a) - 1) / cost(a);
            return unit < units(a) ? unit : units(a);
        };
        const Range panels{unit_at(mine.first) * panels_per_unit, unit_at(mine.last) * panels_per_unit};
        if (panels.first == panels.last) continue;
        const int32_t start = routing.start[a];
        project(
            network.experts[routing.active[a]].first, panels, routing.start[a + 1] - start, rows,
            [&](int64_t row) { return routing.token[start + row]; },
            [&](const Sums& sums) {
                for (int r = 0; r < sums.rows; ++r) {
                    float* hidden = work.hidden + (start + sums.first_row + r) * work.hidden_width +
                                    sums.first_panel / panels_per_unit * panel_width;
                    for (int unit = 0; unit < sums.panels / panels_per_unit; ++unit) {
                        const float* values = sums.row(r) + unit * panels_per_unit * panel_width;
                        for (int i = 0; i < panel_width; i += Float::lanes) {
                            const Float x = load(values + i);
                            store(hidden + unit * panel_width + i,
                                  network.gated ? x * activated(network.activation, load(values + panel_width + i))
                                                : activated(network.activation, x));
                        }
                    }
                }
            });
    }
}

// The residual stream += weight * (hidden @ second^T + bias) of every slot, expert by expert.
inline void second_halves(const Step& step, const Team& team, const FeedForward& network, const Routing& routing) {
    const Workspace& work = step.work;
    const int64_t width = step.model->width;
    const Range panels = team.share(panel_count(width));
    const Rows rows = rows_at(work, team, work.hidden, work.hidden_width);
    if (network.output_bias != nullptr) {
        const int64_t first = panels.first * panel_width, end = panels.last * panel_width;
        for (int64_t t = 0; t < step.count; ++t)
            for (int64_t i = first; i < (end < width ? end : width); ++i) work.x[t * width + i] += network.output_bias[i];
    }
    for (int32_t a = 0; a < *routing.active_count; ++a) {
        const int32_t start = routing.start[a];
        round_for(network.experts[routing.active[a]].second, rows, start, routing.start[a + 1]);
        project(
            network.experts[routing.active[a]].second, panels, routing.start[a + 1] - start, rows,
            [&](int64_t row) { return start + row; },
            [&](const Sums& sums) {
                add_to_rows(sums, width, [&](int64_t row) { return work.x + routing.token[start + row] * width; },
                            [&](int64_t row) { return routing.weight[start + row]; });
            });
    }
}

inline void feed_forward_stage(const Step& step, const Team& team, const FeedForward& network) {
    const Workspace& work = step.work;
    const int64_t width = step.model->width;
    const float* normed = normed_rows(step, team, network.norm);
    const bool own = step.count <= few_tokens;
    const bool asks = network.routed > 0 || network.shared > 1;
    float* place = own ? work.thread + team.thread * work.thread_size + few_tokens * width : work.routing;
    const Routing routing(place, step.count, network);
    if (asks) {
        router_logits(step, team, network, normed);
        team.wait();
    }
    if (own) {
        route(step, network, routing, {0, step.count});
        group_tokens(network, step.count, routing);
    } else {
        route(step, network, routing, team.share(step.count));
        team.wait();
        if (team.thread == 0) group_tokens(network, step.count, routing);
        team.wait();
    }
    first_halves(step, team, network, routing, normed);
    team.wait();
    second_halves(step, team, network, routing);
    team.wait();
}

}  // namespace rxt::RXT_INSTRUCTION_SET
