// What an operator is handed beside tensors, booleans and numbers that are just numbers: a cell, a text.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>

#include "cells.h"

namespace fastseq {

// Operators take a cell as its number: torch's conversion of a std::string argument never frees its copy.
inline Cell cell_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < kCellCount, "scan: cell must be a number from 0 to ", kCellCount - 1,
                  " (the table in fastseq/ops_cells.py), not ", number);
  return Cell(number);
}

inline Cell cell_of(std::string_view name) {
  const int number = number_of_cell(name);
  STD_TORCH_CHECK(number >= 0, "scan: cell must be rnn_tanh, rnn_relu, lstm, gru or gru_reset_before, not ",
                  std::string(name));
  return Cell(number);
}

// The text of a `str` argument, which is freed. An operator declares the argument as a StringHandle: see above.
inline std::string take_text(StringHandle handle) {
  size_t length;
  const char* data;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

}  // namespace fastseq
