package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"tcnat/loader"
)

// ifindexPrefix names a device by its index: how a rule is shown whose device is gone, and
// how it can still be deleted. No device name has a colon.
const ifindexPrefix = "ifindex:"

// devices are the names of the devices of the current network namespace, by ifindex.
type devices map[uint32]string

func listDevices() (devices, error) {
	names, err := loader.Ifnames()
	return devices(names), err
}

// name is a device's name, or what stands for it when it is gone.
func (d devices) name(ifindex uint32) string {
	if name, ok := d[ifindex]; ok {
		return name
	}
	return ifindexPrefix + strconv.FormatUint(uint64(ifindex), 10)
}

// String lists the names, without the loopback.
func (d devices) String() string {
	names := slices.DeleteFunc(slices.Sorted(maps.Values(d)), func(name string) bool { return name == "lo" })
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// parseDevice checks a device name; whether there is one, lookupDevice says.
func parseDevice(text string) (string, error) {
	if digits, ok := strings.CutPrefix(text, ifindexPrefix); ok {
		index, err := strconv.ParseUint(digits, 10, 31)
		if err != nil || index == 0 {
			return "", fmt.Errorf("%s: not the index of a device", text)
		}
		return text, nil
	}
	if text == "" || len(text) > 15 || strings.ContainsAny(text, "/: \t\n") {
		return "", fmt.Errorf("%s: not a device name", quoteEmpty(text))
	}
	return text, nil
}

// lookupDevice is the ifindex of a device in the current network namespace. A device given
// by its index need not exist: its rules outlive it.
func lookupDevice(name string) (uint32, error) {
	if digits, ok := strings.CutPrefix(name, ifindexPrefix); ok {
		index, err := strconv.ParseUint(digits, 10, 31)
		return uint32(index), err
	}
	return loader.Ifindex(name)
}
