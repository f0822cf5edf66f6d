// What this machine's processor can multiply, found at run time; the build itself assumes none of it.
#pragma once

namespace bbopd::cpu {

struct Features {
  bool avx2 = false;         // with FMA
  bool avx512 = false;       // F, BW, DQ and VL
  bool avx512_bf16 = false;  // products of bfloat16 pairs, accumulated in fp32
  bool amx_bf16 = false;     // bfloat16 tiles, and the kernel's permission to use them
};

// Each flag is true only where both the processor and the operating system allow its use.
Features detect_features();

}  // namespace bbopd::cpu
