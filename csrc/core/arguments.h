// What an operator is handed beside tensors, booleans and numbers that are just numbers: a cell, a text. And the error of
// an argument that does not fit.
#pragma once
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "recurrent/cells.h"

namespace fastseq {

// An argument that does not fit. What is called straight from Python (direct*.cpp) declines such a call, so that the
// general path says what is wrong in the caller's terms; any other failure is raised.
struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw BadArgument(message.str());
}
#define FASTSEQ_CHECK(condition, ...) \
  do { \
    if (!(condition)) ::fastseq::refuse(__VA_ARGS__); \
  } while (0)

// Operators take a cell as its number: torch's conversion of a std::string argument never frees its copy.
inline Cell cell_of(int64_t number) {
  FASTSEQ_CHECK(number >= 0 && number < kCellCount, "scan: cell must be a number from 0 to ", kCellCount - 1,
                " (the table in fastseq/recurrent/cells.py), not ", number);
  return Cell(number);
}

inline Cell cell_of(std::string_view name) {
  const int number = number_of_cell(name);
  if (number >= 0) return Cell(number);
  std::string known;
  for (const CellFacts& cell : kCells) known += (known.empty() ? "" : ", ") + std::string(cell.name);
  refuse("scan: cell must be one of ", known, ", not ", name);
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
