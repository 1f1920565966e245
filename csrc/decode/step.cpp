#include "decode/attention.h"
#include "decode/experts.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

template <class Element>
void embed(const Step& step, const Team& team) {
    const Model& model = *step.model;
    const Range tokens = team.share(step.count);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
        const Element* row = static_cast<const Element*>(model.embedding) + step.tokens[t] * model.embedding_stride;
        float* x = step.work.x + t * model.width;
        for (int64_t i = 0; i < model.width; i += Float::lanes) {
            const int64_t left = model.width - i;
            store_up_to(x + i, load_up_to(row + i, left), left);
        }
    }
}

// Logits of the last token of every segment that ends a message.
void vocabulary_head(const Step& step, const Team& team) {
    const Model& model = *step.model;
    const Workspace& work = step.work;
    const auto last_token = [&](int64_t s) { return step.segments[s + 1] - 1; };
    const Range segments = team.share(step.finished_segments);
    for (int64_t s = segments.first; s < segments.last; ++s) {
        const float* x = work.x + last_token(s) * model.width;
        float* row = work.normed + s * model.width;
        if (model.has_head_norm) {
            norm_row(model.head_norm, x, model.width, row);
        } else {
            for (int64_t i = 0; i < model.width; ++i) row[i] = x[i];
        }
    }
    team.wait();
    const Rows rows = rows_for(model.head, work, team, work.normed, model.width, step.finished_segments);
    project(model.head, team.share(model.head.panels()), step.finished_segments, rows, in_order, [&](const Sums& sums) {
                const int64_t first = sums.first_output(), left = model.vocabulary - first;
                const int64_t count = left < sums.panels * panel_width ? left : sums.panels * panel_width;
                for (int r = 0; r < sums.rows; ++r) {
                    const int64_t row = step.rows[last_token(sums.first_row + r)];
                    float* logits = step.logits + row * step.logits_stride + first;
                    for (int64_t i = 0; i < count; i += Float::lanes)
                        store_up_to(logits + i, load(sums.row(r) + i), count - i);
                }
            });
}

void keep_states(const Step& step, const Team& team, float* states) {
    const int64_t width = step.model->width;
    const Range tokens = team.share(step.count);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
        const float* x = step.work.x + t * width;
        float* own = states + step.rows[t] * step.state_row_stride + step.positions[t] * width;
        for (int64_t i = 0; i < width; i += Float::lanes) store_up_to(own + i, load_up_to(x + i, width - i), width - i);
    }
}

template <class Stored>
void all_layers(const Step& step, const Team& team) {
    const Model& model = *step.model;
    if (model.embedding_dtype == DType::float32) {
        embed<float>(step, team);
    } else {
        embed<BFloat16>(step, team);
    }
    prepare_angles(step, team);
    team.wait();
    int64_t reads = 0;
    for (int64_t l = 0; l < model.layer_count; ++l) {
        const Layer& layer = model.layers[l];
        attention_stage<Stored>(step, team, layer.attention, step.cache + l, nullptr);
        if (layer.reads_memory)
            attention_stage<Stored>(step, team, layer.memory.attention, nullptr, step.memory + reads++);
        feed_forward_stage(step, team, layer.feed_forward);
        // The next layer reads the stream and waits before it adds to it.
        if (step.states != nullptr) keep_states(step, team, step.states + l * step.state_layer_stride);
    }
    if (step.finished_segments > 0) vocabulary_head(step, team);
}

}  // namespace

void decode_step(const Step& step) {
    in_team(step.threads, [&](const Team& team) {
        if (step.stored == DType::float32) {
            all_layers<float>(step, team);
        } else {
            all_layers<BFloat16>(step, team);
        }
    });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
