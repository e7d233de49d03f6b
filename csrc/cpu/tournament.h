// Pairs of panels in rounds: in a round no two pairs share a panel, so that what is summed over a panel has one writer
// at a time, in an order that does not depend on the threads.
#pragma once
#include <cstdint>

#include "../common/parallel.h"
#include "buffer.h"
#include "vec.h"

namespace sslops {
namespace {

// Of a symmetric matrix, each with each.
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

// Of a matrix with as many panels of columns as of rows, or more: in round r row i meets column i + r.
class Grid {
 public:
  Grid(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {}

  // play(i, j, state) for every row i and column j; a state from make() for each thread.
  template <typename Make, typename Play>
  void run(const Make& make, const Play& play) const {
    Buffer<int32_t> progress(rows_ + columns_);
    for (int64_t i = 0; i < rows_ + columns_; ++i) progress[i] = 0;
    parallel_tickets(rows_ * columns_, make, [&](int64_t ticket, auto& state) {
      const auto [round, i] = turn(ticket);
      const int64_t j = (i + round) % columns_;
      wait_for(progress + i, static_cast<int32_t>(round));
      wait_for(progress + rows_ + j, played(j, round));
      play(i, j, state);
      advance(progress + rows_ + j);
      advance(progress + i);
    });
  }

 private:
  struct Turn {
    int64_t round, i;
  };

  // Two rounds at a time, the second kLag rows behind the first: of a tile's row and column one or the other has just
  // been in the caches, and none of the few tiles that other threads are at is waited for.
  Turn turn(int64_t ticket) const {
    constexpr int64_t kLag = 4;
    const int64_t round = ticket / (2 * rows_) * 2, k = ticket % (2 * rows_), lag = at_most(kLag, rows_);
    const int64_t mixed = k - lag, end = 2 * (rows_ - lag);
    if (mixed < 0 || round + 1 == columns_) return {round, k};
    if (mixed < end) return {round + mixed % 2, mixed / 2 + (mixed % 2 ? 0 : lag)};
    return {round + 1, rows_ - lag + mixed - end};
  }

  // How many rows column j has met before a round: j, j - 1, .. 0, and after a pause columns - 1, ..
  int32_t played(int64_t j, int64_t round) const {
    const auto within = [&](int64_t from, int64_t to) { return round > from ? at_most(round, to) - from : 0; };
    const int64_t first = j - rows_ + 1;
    const int64_t met = first > 0 ? within(first, j + 1) : within(0, j + 1) + within(columns_ + first, columns_);
    return static_cast<int32_t>(met);
  }

  int64_t rows_, columns_;
};

}  // namespace
}  // namespace sslops
