#include "decode/key_value.h"
#include "decode/projections.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

// Slots [first, first + count) of a row of a layer's memory: normed, projected, and put where keys and values belong.
template <class Stored>
void store_slots(const StoreMemory& a, const Team& team, const MemoryRead& read, const KeyValue& target, int64_t row,
                 int64_t first, int64_t count) {
    float* scratch = a.work.thread + team.thread * a.work.thread_size;
    const int64_t width = a.model->width, dim = read.attention.head_dim;
    const int64_t keys = read.attention.key_value_heads * dim;
    const int64_t offset = read.layer * a.layer_stride + row * a.row_stride;
    for (int64_t s = 0; s < count; ++s) {
        const int64_t place = offset + (first + s) * a.slot_stride;
        if (a.dtype == DType::float32) {
            norm_row(read.slots_norm, static_cast<const float*>(a.source) + place, width, scratch + s * width);
        } else {
            norm_row(read.slots_norm, static_cast<const BFloat16*>(a.source) + place, width, scratch + s * width);
        }
    }
    project(read.slots, {0, read.slots.panels()}, count, rows_for(read.slots, a.work, team, scratch, width, count), in_order,
            [&](const Sums& sums) {
                for (int r = 0; r < sums.rows; ++r)
                    for (int64_t i = 0; i < sums.panels * panel_width; ++i) {
                        const int64_t output = sums.first_output() + i, slot = first + sums.first_row + r;
                        if (output >= 2 * keys) break;
                        const int64_t own = output % keys;
                        const HeadOfCache<Stored> head(target, row, own / dim);
                        if (output < keys) {
                            head.set_key(slot, own % dim, sums.row(r)[i]);
                        } else {
                            head.set_value(slot, own % dim, sums.row(r)[i]);
                        }
                    }
            });
}

}  // namespace

void store_memory(const StoreMemory& a) {
    in_team(a.threads, [&](const Team& team) {
        const int64_t blocks = (a.slots + memory_block - 1) / memory_block;
        int64_t task = 0, reads = 0;
        for (int64_t l = 0; l < a.model->layer_count; ++l) {
            const Layer& layer = a.model->layers[l];
            if (!layer.reads_memory) continue;
            const KeyValue& target = a.memory[reads++];
            for (int64_t row = 0; row < a.rows; ++row)
                for (int64_t block = 0; block < blocks; ++block) {
                    if (task++ % team.threads != team.thread) continue;
                    const int64_t first = block * memory_block;
                    const int64_t count = a.slots - first < memory_block ? a.slots - first : memory_block;
                    if (a.stored == DType::float32) {
                        store_slots<float>(a, team, layer.memory, target, row, first, count);
                    } else {
                        store_slots<BFloat16>(a, team, layer.memory, target, row, first, count);
                    }
                }
        }
    });
}

}  // namespace rxt::RXT_INSTRUCTION_SET
