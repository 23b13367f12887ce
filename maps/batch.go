package maps

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/cilium/ebpf"
)

// batchSize is how many elements one system call reads or writes.
const batchSize = 4096

// readAll calls visit for every element of m. Elements that come or go meanwhile may be
// missed or seen twice, as ever with hash maps.
func readAll[K, V any](m *ebpf.Map, visit func(K, V)) error {
	var (
		cursor ebpf.MapBatchCursor
		size   = min(batchSize, int(m.MaxEntries()))
		keys   = make([]K, size)
		values = make([]V, size)
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if errors.Is(err, syscall.ENOSPC) && size < 1<<20 {
			// A bucket of the hash holds more than that: nothing was read, ask for more.
			size *= 2
			keys, values = make([]K, size), make([]V, size)
			continue
		}
		done := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !done {
			return err
		}
		for i := range n {
			visit(keys[i], values[i])
		}
		if done {
			return nil
		}
	}
}

// writeAll puts every element into m, many at a time. A nil map is passed over.
func writeAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for m != nil && len(keys) > 0 {
		n := min(batchSize, len(keys))
		if _, err := m.BatchUpdate(keys[:n], values[:n], nil); err != nil {
			return err
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

// setAll makes the elements of m that belong to the caller equal to want. What is new is
// written before what is gone is deleted.
func setAll[K, V comparable](m *ebpf.Map, want map[K]V, mine func(K) bool) error {
	have := map[K]V{}
	err := readAll(m, func(k K, v V) {
		if mine(k) {
			have[k] = v
		}
	})
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	for k, v := range want {
		if old, ok := have[k]; ok && old == v {
			continue
		}
		if err := m.Put(k, v); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete: %w", err)
		}
	}
	return nil
}
