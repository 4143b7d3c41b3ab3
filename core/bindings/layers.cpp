// Layers of blocks of KV, to where they belong in the KV of a prompt: for all blocks of a read in one call, without the GIL, since
// whoever computes with the layers before needs it.
#include <cstring>
#include <optional>

#include "bindings.hpp"
#include "base/copying.hpp"
#include "base/crc32c.hpp"

using namespace kvstrata;

namespace {

constexpr int kAxes = 5;  // layers, keys and values, heads, tokens, channels

struct Block {
    Buffer words;
    std::optional<Buffer> sums;  // none where the words were checked before
    size_t start;                // token
    long damaged = -1;
    Block(nb::handle words_of, nb::handle sums_of, size_t at) : words(words_of), start(at) {
        if (!sums_of.is_none()) sums.emplace(sums_of);
    }
};

// A view of an array with strides; released with the GIL held.
class Array {
public:
    explicit Array(nb::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_WRITABLE) != 0) throw nb::python_error();
        if (view_.ndim != kAxes) {
            PyBuffer_Release(&view_);
            throw InvalidValue("out has to have five axes");
        }
    }
    ~Array() { PyBuffer_Release(&view_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    size_t size(int axis) const { return static_cast<size_t>(view_.shape[axis]); }
    Py_ssize_t stride(int axis) const { return view_.strides[axis]; }
    u8* data() const { return static_cast<u8*>(view_.buf); }
    size_t item() const { return static_cast<size_t>(view_.itemsize); }
    size_t row_bytes() const { return size(kAxes - 1) * item(); }

private:
    Py_buffer view_;
};

// KV of a prefix is more than the caches hold, and is read layer by layer later.
void copy(u8* to, const u8* from, size_t n, u32* sum) {
    if (sum)
        *sum = stream_crc32c(to, from, n, *sum);
    else
        stream_bytes(to, from, n);
}

// Copies `rows` rows that lie one after the other; continues the sum, if there is one, by all that it is.
void copy_rows(const Array& out, u8* to, const u8* from, size_t rows, u32* sum) {
    const size_t row = out.row_bytes(), item = out.item();
    if (out.stride(4) == static_cast<Py_ssize_t>(item)) {
        if (out.stride(3) == static_cast<Py_ssize_t>(row)) return copy(to, from, rows * row, sum);
        for (size_t n = 0; n < rows; ++n, from += row, to += out.stride(3)) copy(to, from, row, sum);
        return;
    }
    if (sum) *sum = crc32c(*sum, from, rows * row);
    for (size_t n = 0; n < rows; ++n, to += out.stride(3))
        for (size_t i = 0; i < out.size(4); ++i, from += item) std::memcpy(to + static_cast<Py_ssize_t>(i) * out.stride(4), from, item);
}

// The first of the layers that isn't what its sum says, or -1; all before it are copied.
long place(const Array& out, const Block& block, size_t tokens, size_t first, size_t stop) {
    const size_t bytes = tokens * out.row_bytes();
    const u8* from = block.words.data() + first * out.size(1) * out.size(2) * bytes;
    for (size_t layer = first; layer < stop; ++layer) {
        u32 sum = 0, wanted;
        for (size_t kv = 0; kv < out.size(1); ++kv) {
            for (size_t head = 0; head < out.size(2); ++head, from += bytes) {
                const size_t at[] = {layer, kv, head, block.start};
                u8* to = out.data();
                for (int axis = 0; axis < 4; ++axis) to += static_cast<Py_ssize_t>(at[axis]) * out.stride(axis);
                copy_rows(out, to, from, tokens, block.sums ? &sum : nullptr);
            }
        }
        if (!block.sums) continue;
        std::memcpy(&wanted, block.sums->data() + layer * sizeof wanted, sizeof wanted);
        if (sum != wanted) return static_cast<long>(layer);
    }
    return -1;
}

nb::list place_layers(nb::handle out_object, nb::handle blocks, size_t tokens, size_t first, size_t stop) {
    const Array out(out_object);
    const size_t layer_bytes = out.size(1) * out.size(2) * tokens * out.row_bytes();
    if (first > stop || stop > out.size(0)) throw InvalidValue("out hasn't so many layers");
    std::vector<std::unique_ptr<Block>> wanted;
    for (nb::handle block : nb::iter(blocks)) {
        const nb::tuple fields = nb::cast<nb::tuple>(block);
        wanted.push_back(std::make_unique<Block>(nb::handle(fields[0]), nb::handle(fields[1]), nb::cast<size_t>(fields[2])));
        const Block& last = *wanted.back();
        if (last.words.size() < stop * layer_bytes || (last.sums && last.sums->size() < stop * sizeof(u32)) ||
            last.start + tokens > out.size(3))
            throw InvalidValue("a block hasn't so many layers, or doesn't fit into out");
    }
    {
        const nb::gil_scoped_release free;
        for (auto& block : wanted) block->damaged = place(out, *block, tokens, first, stop);
        end_of_stream();
    }
    nb::list damaged;
    for (const auto& block : wanted) damaged.append(block->damaged);
    return damaged;
}

}  // namespace

void kvstrata::bind_layers(nb::module_& m) {
    m.def("place_layers", &place_layers, nb::arg("out"), nb::arg("blocks"), nb::arg("tokens"), nb::arg("first"), nb::arg("stop"),
          "Copy layers `first` to `stop` of blocks of so many tokens to their places in `out`, [layers, 2, kv_heads, tokens,\n"
          "head_dim], and check them: `blocks` are (words, checksums of the layers as 32-bit numbers, or None,\n"
          "first token). Returns the first layer of each that is damaged, -1 where none is. What was damaged is copied, too.");
}
