// The cells, and what a kernel's caller must know of each. fastseq/recurrent/cells.py has the same table, and a test compares them.
#pragma once
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace fastseq {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, lstm_coupled };

struct CellFacts {
  const char* name;
  int gates;   // G: w_ih and w_hh have G blocks of H rows
  int tape;    // blocks of H that the tape keeps of a step; 0: the output is enough
  bool has_c;  // beside h: then h = o tanh(c), o is the last gate and the tape's last block
};
constexpr CellFacts kCells[] = {  // in Cell's order
    {"rnn_tanh", 1, 0, false}, {"rnn_relu", 1, 0, false}, {"lstm", 4, 4, true}, {"gru", 3, 4, false},
    {"gru_reset_before", 3, 4, false}, {"lstm_coupled", 3, 3, true}};
constexpr int kCellCount = int(sizeof(kCells) / sizeof(kCells[0]));

constexpr int gates_of(Cell cell) { return kCells[int(cell)].gates; }
constexpr int tape_of(Cell cell) { return kCells[int(cell)].tape; }
constexpr bool has_c(Cell cell) { return kCells[int(cell)].has_c; }

// body(std::integral_constant<Cell, ...>{}) of a cell that is known at run time; returns what it returns.
template <int i = 0, class Body>
auto for_cell(Cell cell, const Body& body) {
  if constexpr (i + 1 < kCellCount)
    if (int(cell) != i) return for_cell<i + 1>(cell, body);
  return body(std::integral_constant<Cell, Cell(i)>{});
}

// The number of the cell of that name; -1: there is none.
constexpr int number_of_cell(std::string_view name) {
  for (int i = 0; i < kCellCount; ++i)
    if (name == kCells[i].name) return i;
  return -1;
}

}  // namespace fastseq
