// The cells, and what a kernel's caller must know of each. fastseq/recurrent/cells.py has the same table, and a test compares them.
#pragma once
#include <cstdint>
#include <string_view>

namespace fastseq {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };

struct CellFacts {
  const char* name;
  int gates;  // G: w_ih and w_hh have G blocks of H rows
  int tape;   // blocks of H that the tape keeps of a step; 0: the output is enough
};
constexpr CellFacts kCells[] = {  // in Cell's order
    {"rnn_tanh", 1, 0}, {"rnn_relu", 1, 0}, {"lstm", 4, 4}, {"gru", 3, 4}, {"gru_reset_before", 3, 4}};
constexpr int kCellCount = int(sizeof(kCells) / sizeof(kCells[0]));

constexpr int gates_of(Cell cell) { return kCells[int(cell)].gates; }

// The number of the cell of that name; -1: there is none.
constexpr int number_of_cell(std::string_view name) {
  for (int i = 0; i < kCellCount; ++i)
    if (name == kCells[i].name) return i;
  return -1;
}

}  // namespace fastseq
