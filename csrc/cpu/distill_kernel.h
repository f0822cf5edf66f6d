// linear_distill over tiles of logits. Every slot owns a range of the vocabulary and goes through it once a pass:
//
// measure: logits -> softmax statistics, logits of labels and supports (and, as far as memory allows, all of them).
//
// average: full teachers only -> the divergence, and the mean that all but forward KL subtract in their gradient.
//
// descend: logits again -> gradients of the logits, a tile at a time -> gradients of hidden and weight.
//
// Tokens are rows and vocabulary entries are lanes; what a pass finds out about a token is merged in the order of
// slots.
#pragma once

#include <memory>

#include "cpu/distill_rows.h"
#include "cpu/distill_tokens.h"
#include "cpu/input_gradients.h"
#include "cpu/support_rows.h"

namespace bbopd::cpu::BBOPD_ISA {

template <class G>
class Distill {
 public:
  Distill(const DistillArguments& arguments, const Products& products, std::unique_ptr<Logits> teacher_logits)
      : a(arguments),
        vocabulary(a.V, a.threads),
        student(a.student, a.N, vocabulary, products),
        teacher(std::move(teacher_logits)),
        gradients(a, products, vocabulary),
        tokens(a),
        temper(a.temperature),
        wants_labels(a.labels != nullptr),
        keeps_half(a.student.hidden.type != Type::float32 && a.student.weight.type != Type::float32),
        inverse_cap(a.student.softcap == 0.0F ? 0.0F : 1.0F / a.student.softcap),
        block(vocabulary.block) {
    const Index slots = vocabulary.slots;
    sums = Buffer(static_cast<std::size_t>(slots * a.N) * sizeof(Sums));
    teacher_sums = Buffer(teacher ? static_cast<std::size_t>(slots * a.N) * sizeof(Sums) : 0);
    dense = Buffer(teacher ? static_cast<std::size_t>(slots * a.N) * sizeof(DenseSums) : 0);
    cursors = Buffer(a.signal == Signal::support ? static_cast<std::size_t>(slots * a.N) * sizeof(Next) : 0);
    support_rows = Buffer(static_cast<std::size_t>(a.threads * SupportRow::floats_for(a.K)) * sizeof(float));
    z = Buffer(static_cast<std::size_t>(slots * kGroupTokens * block) * sizeof(float));
    t = Buffer(teacher ? static_cast<std::size_t>(slots * kTokens * block) * sizeof(float) : 0);
    const Index item = keeps_half ? 2 : 4;
    kept_blocks = gradients.are_wanted() || teacher ? a.stash_bytes / slots / larger(1, a.N * (block * item + 4)) : 0;
    kept_blocks = smaller(kept_blocks, (vocabulary.blocks + slots - 1) / slots);
    kept = Buffer(static_cast<std::size_t>(slots * kept_blocks * a.N * block * item));
    centres = Buffer(static_cast<std::size_t>(slots * kept_blocks * a.N) * sizeof(float));
  }

  void run() {
    const int slots = vocabulary.slots;
    if (a.N == 0) return gradients.zero();
    if (a.signal == Signal::support) for_tokens([this](Index n) { tokens.read_support(n); });
    parallel(slots, [this](int slot) { measure(slot); });
    for_each_token(a.threads, a.N, [this](int slot, Index n) { settle(slot, n, merged(n)); });
    if (teacher && (rows::has_mean(a.divergence) || !gradients.are_wanted())) {
      parallel(slots, [this](int slot) { look_at_teacher<false>(slot); });
      for_tokens([this](Index n) { settle_dense(n); });
    }
    if (!gradients.are_wanted()) return;
    gradients.prepare();
    if (teacher) {
      parallel(slots, [this](int slot) { look_at_teacher<true>(slot); });
      if (!rows::has_mean(a.divergence)) for_tokens([this](Index n) { settle_dense(n); });
    } else {
      parallel(slots, [this](int slot) {
        descend(slot, [this](int s, Index first, Index count, Index b) { sparse_rows(s, first, count, b); });
      });
    }
    gradients.finish();
  }

 private:
  static constexpr std::int32_t kNoMore = 0x7fffffff;

  template <class Body>
  void for_tokens(Body body) {
    for_each_token(a.threads, a.N, [&](int, Index n) { body(n); });
  }

  Sums& sum(Buffer& of, int slot, Index n) { return of.as<Sums>()[slot * a.N + n]; }
  // The entry of a token's support that comes next on a slot's way through the vocabulary, and its id: most blocks hold
  // none of a token, and must not touch its support to find out.
  struct Next {
    int entry;
    std::int32_t id;
  };
  Next& next(int slot, Index n) { return cursors.as<Next>()[slot * a.N + n]; }
  void begin_pass(int slot) {
    const Index first = vocabulary.begin(vocabulary.first_of(slot));
    for (Index n = 0; a.signal == Signal::support && n < a.N; ++n)
      advance(next(slot, n), n, tokens.support_from(n, first));
  }
  void advance(Next& cursor, Index n, int entry) {
    cursor = {entry, entry < tokens.support_size(n) ? tokens.support(n)[entry].id : kNoMore};
  }
  // Calls `body(entry, its place in the block)` for the entries of a token's support up to `end`.
  template <class Body>
  void for_support(int slot, Index n, Index first, Index end, Body body) {
    Next& cursor = next(slot, n);
    while (cursor.id < end) {
      SupportEntry& entry = tokens.support(n)[cursor.entry];
      body(entry, entry.id - first);
      advance(cursor, n, cursor.entry + 1);
    }
  }
  float* tile(int slot) { return z.as<float>() + slot * kGroupTokens * block; }
  float* teacher_tile(int slot) { return teacher ? t.as<float>() + slot * kTokens * block : nullptr; }
  bool is_kept(int slot, Index b) const { return b - vocabulary.first_of(slot) < kept_blocks; }
  Index kept_row(int slot, Index b, Index n) const {
    return (slot * kept_blocks + b - vocabulary.first_of(slot)) * a.N + n;
  }

  // ---------------------------------------------------------------- first pass

  void measure(int slot) {
    begin_pass(slot);
    for (Index n = 0; n < a.N; ++n) {
      sum(sums, slot, n) = {vf{}, vf{}, -__builtin_inff()};
      if (teacher) sum(teacher_sums, slot, n) = {vf{}, vf{}, -__builtin_inff()};
    }
    for (Index b = vocabulary.first_of(slot); b < vocabulary.first_of(slot + 1); ++b) {
      const Index first = vocabulary.begin(b), count = vocabulary.count(b);
      student.load(slot, first, count);
      if (teacher) teacher->load(slot, first, count);
      for (Index n = 0; n < a.N; n += kTokens) {
        const Index rows = smaller(kTokens, a.N - n);
        student.write(slot, n, rows, tile(slot));
        if (teacher) teacher->write(slot, n, rows, teacher_tile(slot));
        for (Index r = 0; r < rows; ++r)
          measure_row(slot, b, n + r, tile(slot) + r * block, teacher ? teacher_tile(slot) + r * block : nullptr);
      }
    }
    student.release();
    if (teacher) teacher->release();
  }

  void measure_row(int slot, Index b, Index n, float* logits, float* teacher_logits) {
    const Index first = vocabulary.begin(b), count = vocabulary.count(b);
    const int lanes = static_cast<int>(block);
    TokenPlan& plan = tokens.plans[n];
    if (wants_labels && a.labels[n] >= first && a.labels[n] < first + count)
      plan.label_logit = logits[a.labels[n] - first];
    if (a.signal == Signal::sampled && a.has_signal[n] != 0 && a.ids[n] >= first && a.ids[n] < first + count)
      plan.sampled_logit = logits[a.ids[n] - first];
    if (is_kept(slot, b)) keep(slot, b, n, logits, teacher_logits);
    if (a.signal == Signal::support) {
      for_support(slot, n, first, first + count, [&](SupportEntry& entry, Index c) {
        entry.logit = logits[c];
        logits[c] = -__builtin_inff();
      });
    }
    add_row(logits, lanes, temper, wants_labels, sum(sums, slot, n));
    if (teacher) {
      for (int c = 0; c < lanes; c += kLanes) {
        const vf logit = BBOPD_ISA::load(teacher_logits + c);
        store(teacher_logits + c, logit > rows::kInfinityStandIn ? fill(rows::kInfinityStandIn) : logit);  // NaN stays
      }
      add_row(teacher_logits, lanes, temper, false, sum(teacher_sums, slot, n));
    }
  }

  void settle(int slot, Index n, const TokenSums& all) {
    if (a.signal == Signal::support) {
      SupportRow row(support_rows.as<float>() + slot * SupportRow::floats_for(a.K), a.K);
      row.settle(a, temper, n, all, tokens.support(n), tokens.support_size(n), tokens.plans[n]);
    }
    tokens.settle(n, all);
  }

  TokenSums merged(Index n) {
    TokenSums all;
    for (int slot = 0; slot < vocabulary.slots; ++slot) {
      const Sums& part = sum(sums, slot, n);
      const double max = part.max, tempered = sum_lanes(part.tempered);
      all.tempered.merge({max * temper.inverse, tempered});
      all.plain.merge({max, temper.power == Temper::same ? tempered : static_cast<double>(sum_lanes(part.plain))});
      if (teacher) {
        const Sums& other = sum(teacher_sums, slot, n);
        all.teacher.merge({static_cast<double>(other.max) * temper.inverse, sum_lanes(other.tempered)});
      }
    }
    return all;
  }

  // ---------------------------------------------------------------- logits of later passes

  void keep(int slot, Index b, Index n, const float* logits, const float* teacher_logits) {
    const Index row = kept_row(slot, b, n);
    if (keeps_half) {
      centres.as<float>()[row] =
          keep_row(logits, teacher_logits, static_cast<int>(block), kept.as<std::uint16_t>() + row * block);
    } else {
      std::memcpy(kept.as<float>() + row * block, logits, static_cast<std::size_t>(block) * sizeof(float));
    }
  }

  void write_logits(int slot, Index b, Index n, Index rows, float* to) {
    if (teacher) teacher->write(slot, n, rows, teacher_tile(slot));
    if (!is_kept(slot, b)) return student.write(slot, n, rows, to);
    for (Index r = 0; r < rows; ++r) {
      const Index row = kept_row(slot, b, n + r);
      if (keeps_half) {
        restore_row(kept.as<std::uint16_t>() + row * block, teacher ? teacher_tile(slot) + r * block : nullptr,
                    static_cast<int>(block), centres.as<float>()[row], to + r * block);
      } else {
        std::memcpy(to + r * block, kept.as<float>() + row * block, static_cast<std::size_t>(block) * sizeof(float));
      }
    }
  }

  // ---------------------------------------------------------------- gradients of logits

  void sparse_rows(int slot, Index n, Index rows, Index b) {
    const Index first = vocabulary.begin(b), count = vocabulary.count(b);
    float* const to = tile(slot) + n % kGroupTokens * block;
    write_logits(slot, b, n, rows, to);
    for (Index r = 0; r < rows; ++r) {
      const TokenPlan& plan = tokens.plans[n + r];
      float* const row = to + r * block;
      sparse_gradient(row, static_cast<int>(block), temper,
                      Row{.max = plan.max, .tempered = plan.tempered, .plain = plan.plain}, inverse_cap);
      if (a.signal == Signal::support)
        for_support(slot, n + r, first, first + count,
                    [&](const SupportEntry& entry, Index c) { row[c] = entry.gradient; });
      if (a.signal == Signal::sampled && a.has_signal[n + r] != 0 && a.ids[n + r] >= first &&
          a.ids[n + r] < first + count)
        row[a.ids[n + r] - first] += plan.sampled_patch;
      finish_row(n + r, row, first, count);
    }
  }

  void finish_row(Index n, float* row, Index first, Index count) {
    if (wants_labels && a.labels[n] >= first && a.labels[n] < first + count)
      row[a.labels[n] - first] -= tokens.plans[n].label_patch;
    for (Index c = count; c < block; ++c) row[c] = 0.0F;
  }

  template <bool gradient>
  void look_at_teacher(int slot) {
    for (Index n = 0; n < a.N; ++n) dense.as<DenseSums>()[slot * a.N + n] = {};
    rows::with_divergence(a.divergence, [&]<Divergence kind>() {
      const auto rows_of = [this](int s, Index n, Index rows, Index b) { dense_rows<kind, gradient>(s, n, rows, b); };
      if constexpr (gradient) {
        descend(slot, rows_of);
      } else {
        for (Index b = vocabulary.first_of(slot); b < vocabulary.first_of(slot + 1); ++b) {
          load(slot, b);
          for (Index n = 0; n < a.N; n += kTokens) rows_of(slot, n, smaller(kTokens, a.N - n), b);
        }
        student.release();
        teacher->release();
      }
    });
  }

  template <Divergence kind, bool gradient>
  void dense_rows(int slot, Index n, Index rows, Index b) {
    float* const to = tile(slot) + n % kGroupTokens * block;
    write_logits(slot, b, n, rows, to);
    for (Index r = 0; r < rows; ++r) {
      const Index token = n + r;
      const TokenPlan& plan = tokens.plans[token];
      const bool labelled = wants_labels && a.labels[token] >= 0;
      Row row{.max = plan.max,
              .tempered = 0.0F,
              .plain = plan.plain,
              .log_sum = plan.log_sum,
              .teacher_max = plan.teacher_max,
              .teacher_log_sum = plan.teacher_log_sum,
              .mean = plan.mean,
              .kd_grad = a.kd_grad[token],
              .ce_grad = labelled ? a.ce_grad[token] : 0.0F,
              .plain_scale = 0.0F};
      if (labelled) {
        row.plain_scale = temper.power == Temper::same ? row.ce_grad : plan.plain;
        if (temper.power == Temper::square)
          row.plain_scale = row.ce_grad * __builtin_expf(2.0F * plan.student_lse - plan.plain_lse);
      }
      float* const logits = to + r * block;
      if (a.has_signal[token] != 0) {
        const DenseSums found = dense_row<kind, gradient>(
            logits, teacher_tile(slot) + r * block, static_cast<int>(block), temper, row, a.beta, a.skew, inverse_cap);
        DenseSums& all = dense.as<DenseSums>()[slot * a.N + token];
        all.kd += found.kd;
        all.mean += found.mean;
        all.floored += found.floored;
      } else if constexpr (gradient) {
        sparse_gradient(logits, static_cast<int>(block), temper, row, inverse_cap);
      }
      if constexpr (gradient) finish_row(token, logits, vocabulary.begin(b), vocabulary.count(b));
    }
  }

  void settle_dense(Index n) {
    DenseSums all;
    for (int slot = 0; slot < vocabulary.slots; ++slot) {
      const DenseSums& part = dense.as<DenseSums>()[slot * a.N + n];
      all.kd += part.kd;
      all.mean += part.mean;
      all.floored += part.floored;
    }
    a.kd[n] = all.kd;
    a.floored[n] = all.floored;
    tokens.plans[n].mean = all.mean;
  }

  // ---------------------------------------------------------------- the last pass

  void load(int slot, Index b) {
    if (is_kept(slot, b)) {
      student.take(slot, vocabulary.begin(b), vocabulary.count(b));
    } else {
      student.load(slot, vocabulary.begin(b), vocabulary.count(b));
    }
    if (teacher) teacher->load(slot, vocabulary.begin(b), vocabulary.count(b));
  }

  // One pass with gradients; `write_rows(slot, token, rows, block)` leaves those of the logits in the slot's tile.
  template <class WriteRows>
  void descend(int slot, WriteRows write_rows) {
    begin_pass(slot);
    for (Index b = vocabulary.first_of(slot); b < vocabulary.first_of(slot + 1); ++b) {
      load(slot, b);
      gradients.begin(slot, student.current(slot));
      for (Index g = 0; g < gradients.groups(); ++g) {
        const Index first = g * kGroupTokens, end = smaller(first + kGroupTokens, a.N);
        for (Index n = first; n < end; n += kTokens) write_rows(slot, n, smaller(kTokens, end - n), b);
        gradients.add(slot, g, tile(slot), b == vocabulary.first_of(slot));
      }
      gradients.end(slot, b);
    }
    student.release();
    if (teacher) teacher->release();
  }

  const DistillArguments& a;
  const Vocabulary vocabulary;
  HeadLogits<G> student;
  std::unique_ptr<Logits> teacher;
  InputGradients<G> gradients;
  Tokens tokens;
  const Temper temper;
  const bool wants_labels, keeps_half;
  const float inverse_cap;
  const Index block;
  Index kept_blocks;
  Buffer sums, teacher_sums, dense, cursors, support_rows, z, t, kept, centres;
};

}  // namespace bbopd::cpu::BBOPD_ISA
