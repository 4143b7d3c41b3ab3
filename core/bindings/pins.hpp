// Objects of Python that export memory of the arena, and keep the store alive meanwhile.
#pragma once

#include "bindings.hpp"

namespace kvstrata {

// Exports a part of the arena, read-only, and keeps it pinned until it is released and nobody has a view any more.
struct PinHandle {
    std::shared_ptr<Store> store;
    Pin pin;
    bool whole_record = false;  // or only the value
    std::shared_ptr<Buffer> local;  // instead of a pin: a value in private memory, for which the arena had no room
    bool released = false;
    int exports = 0;
    nb::object view;            // given out by `with`: a weak reference

    void release_if_unused() {
        if (!released || exports) return;
        pin = Pin();  // gone with this statement: before the store that it needs
        store.reset();
        local.reset();
    }
    // In a forked child it holds nothing: there the record may go, and another one come, at any time.
    bool holds() const { return !released && (local || (store && !store->left_to_parent())); }
    const u8* data() const { return local ? local->data() : whole_record ? pin.record() : pin.value(); }
    u64 size() const { return local ? local->size() : whole_record ? pin.record_size() : pin.size(); }
};

// A writable part of the arena: the payload of a put, or the record of a load.
struct WriteHandle {
    std::shared_ptr<Store> store;
    std::optional<Reservation> reservation;
    std::optional<Loading> loading;
    Pin kept;  // of the published record, while somebody can still write to it
    bool finished = false;
    int exports = 0;
    nb::object view;  // a weak reference

    // Ends it. A view that somebody still holds keeps the memory that it looks into, until it goes.
    void finish() {
        finished = true;
        if (exports == 0) reservation.reset(), loading.reset(), kept = Pin();
    }
    u8* data() const { return reservation ? reservation->payload() : loading->block.bytes(); }
    u64 size() const {
        return reservation ? reservation->header.stored_len : u64{loading->block.units()} * kUnit;
    }
};

// A memoryview of the object.
nb::object view_of(nb::handle object);
// A kvstrata._core.Pin: of the value, or with `whole_record`, of all of the record.
nb::object pin_object(const std::shared_ptr<Store>& store, Pin&& pin, bool whole_record = false);
// What a put returns: 0, or the number of the new record when the older one is, or may be, on disk.
u64 replaced(Published published, const Reservation& reservation);

void bind_pins(nb::module_& m);

}  // namespace kvstrata
