#include "cpu/alignment.h"

#include <algorithm>
#include <cstring>

namespace bbopd::cpu {

namespace {

// Reads the bytes of tokens one token after another.
class Reader {
 public:
  explicit Reader(const Tokens& tokens) : tokens_(tokens) {}

  Index taken() const { return taken_; }
  std::size_t left() const { return static_cast<std::size_t>(end_ - next_); }
  const std::uint8_t* next() const { return next_; }
  void advance(std::size_t bytes) { next_ += bytes; }

  // Goes on to a token with bytes, where the last one has been read; false at the end of the text.
  bool fill() {
    while (next_ == end_) {
      if (!is_text_next()) return false;
      take();
    }
    return true;
  }

  void take_empty() {
    while (is_text_next() && size_of(tokens_.ids[taken_]) == 0) take();
  }

 private:
  bool is_text_next() const {
    if (taken_ == tokens_.count) return false;
    const std::int64_t id = tokens_.ids[taken_];
    return id >= 0 && id < tokens_.vocabulary && tokens_.is_text[id] != 0;
  }
  std::int64_t size_of(std::int64_t id) const { return tokens_.offsets[id + 1] - tokens_.offsets[id]; }
  void take() {
    const std::int64_t id = tokens_.ids[taken_++];
    next_ = tokens_.bytes + tokens_.offsets[id];
    end_ = next_ + size_of(id);
  }

  const Tokens& tokens_;
  Index taken_ = 0;
  const std::uint8_t *next_ = nullptr, *end_ = nullptr;
};

}  // namespace

Index align_tokens(const Tokens& first, const Tokens& second, std::int64_t* ends) {
  Reader a(first), b(second);
  Index groups = 0;
  while (a.fill() && b.fill()) {
    const std::size_t common = std::min(a.left(), b.left());
    if (std::memcmp(a.next(), b.next(), common) != 0) break;
    a.advance(common);
    b.advance(common);
    if (a.left() == 0 && b.left() == 0) {
      a.take_empty();
      b.take_empty();
      ends[2 * groups] = a.taken();
      ends[2 * groups + 1] = b.taken();
      ++groups;
    }
  }
  return groups;
}

}  // namespace bbopd::cpu
