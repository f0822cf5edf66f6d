// The ops for the instruction set of the file that includes this.
#pragma once

#include <memory>

#include "cpu/dispatch.h"
#include "cpu/distill_kernel.h"
#include "cpu/logprobs_kernel.h"
#include "cpu/signal_rows.h"

namespace bbopd::cpu::BBOPD_ISA {

// Products of bfloat16 need both sides in it; everything else is multiplied in float32.
inline bool is_bfloat16(const Head& head) {
  return head.hidden.type == Type::bfloat16 && head.weight.type == Type::bfloat16;
}

template <class G>
std::unique_ptr<Logits> head_logits(const DistillArguments& a, const Vocabulary& vocabulary, const Products& products) {
  return std::make_unique<HeadLogits<G>>(a.teacher, a.N, vocabulary, products);
}

template <class Bf16>
std::unique_ptr<Logits> teacher_logits(const DistillArguments& a, const Products& products) {
  if (a.signal != Signal::full) return nullptr;
  const Vocabulary vocabulary(a.V, a.threads);
  if (a.teacher_logits.data != nullptr) return std::make_unique<GivenLogits>(a.teacher_logits, vocabulary);
  return is_bfloat16(a.teacher) ? head_logits<Bf16>(a, vocabulary, products)
                                : head_logits<Float32>(a, vocabulary, products);
}

template <class Bf16>
void distill(const DistillArguments& a, const Products& products) {
  if (is_bfloat16(a.student)) {
    Distill<Bf16>(a, products, teacher_logits<Bf16>(a, products)).run();
  } else {
    Distill<Float32>(a, products, teacher_logits<Bf16>(a, products)).run();
  }
}

template <class Bf16>
void logprobs(const LogprobsArguments& a, const Products& products) {
  if (is_bfloat16(a.head)) {
    Logprobs<Bf16>(a, products).run();
  } else {
    Logprobs<Float32>(a, products).run();
  }
}

}  // namespace bbopd::cpu::BBOPD_ISA
