// Pairs of panels of a symmetric matrix in the rounds of a tournament: in a round no two pairs share a panel, so that
// what is summed over a panel has one writer at a time, in an order that does not depend on the threads.
#pragma once
#include <cstdint>

#include "../common/parallel.h"
#include "buffer.h"

namespace sslops {
namespace {

class Tournament {
 public:
  explicit Tournament(int64_t panels) : panels_(panels), seats_(panels + panels % 2) {}

  int64_t pairs() const { return panels_ + (panels_ ? seats_ / 2 * (seats_ - 1) : 0); }

  // play(i, j, state), i <= j, for every pair, each panel with itself first; a state from make() for each thread.
  template <typename Make, typename Play>
  void run(const Make& make, const Play& play) const {
    Buffer<int32_t> progress(panels_);
    for (int64_t i = 0; i < panels_; ++i) progress[i] = 0;
    parallel_tickets(pairs(), make, [&](int64_t ticket, auto& state) {
      if (ticket < panels_) {
        play(ticket, ticket, state);
        return advance(progress + ticket);
      }
      const int64_t game = ticket - panels_, round = game / (seats_ / 2), table = game % (seats_ / 2), n = seats_ - 1;
      const int64_t a = table ? (round + table) % n : n, b = table ? (round - table + n) % n : round;
      const int64_t i = a < b ? a : b, j = a < b ? b : a;
      const int32_t played = static_cast<int32_t>(1 + round);
      wait_for(progress + i, played);
      if (j < panels_) {  // otherwise the seat is empty
        wait_for(progress + j, played);
        play(i, j, state);
        advance(progress + j);
      }
      advance(progress + i);
    });
  }

 private:
  int64_t panels_, seats_;
};

}  // namespace
}  // namespace sslops
