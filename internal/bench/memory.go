package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

const (
	slabPoll     = 300 * time.Millisecond
	slabPatience = 10 * time.Second
	slabStill    = 128 // kB that slab memory may change by between two looks
)

// memoryRun measures what the tables take with no flow in them, and what each TCP flow adds.
func memoryRun(ctx context.Context, b *bench, _ field, m *Measurement) (err error) {
	none := Case{Name: "memlock with no flow", Unit: unitMegabytes, LowerIsBetter: true}
	if err := b.emptyMemory(ctx, &none); err != nil {
		return err
	}
	f, err := b.scene(ctx, []string{iptables, tcnatLeased}, b.rigOptions(), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close(ctx)) }()
	m.Notes = append(m.Notes,
		"memlock is what the kernel says of each pinned map (fdinfo); slab is the growth of Slab in /proc/meminfo, of the whole machine",
		fmt.Sprintf("%d answered TCP flows", b.remembered))
	locked := Case{Name: "memlock of a TCP flow", Unit: unitBytes, LowerIsBetter: true}
	slab := Case{Name: "slab of a TCP flow", Unit: unitBytes, LowerIsBetter: true}
	for _, name := range []string{tcnatLeased, iptables} {
		c, ok := f[name]
		if !ok {
			continue
		}
		b.say("%s: %d TCP flows: %s", m.Name, b.remembered, name)
		before, err := c.memory(ctx)
		if err != nil {
			return err
		}
		if err := c.openTCP(ctx, b.remembered, b.containers); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		after, err := c.memory(ctx)
		if err != nil {
			return err
		}
		flows := float64(b.remembered)
		if c.pins != "" {
			locked.Rows = append(locked.Rows, Row{Contender: name, Values: []float64{(after.locked - before.locked) / flows}})
		}
		slab.Rows = append(slab.Rows, Row{Contender: name, Values: []float64{(after.slab - before.slab) / flows}})
	}
	for _, c := range []*Case{&none, &locked, &slab} {
		c.settle()
		m.Cases = append(m.Cases, *c)
	}
	return nil
}

// emptyMemory measures an instance of the size that attach makes by itself.
func (b *bench) emptyMemory(ctx context.Context, none *Case) (err error) {
	c, err := newContender(ctx, tcnatLeased, b.rigOptions(), installOptions{binary: b.Binary}, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(ctx)) }()
	taken, err := c.memory(ctx)
	if err != nil {
		return err
	}
	none.Rows = append(none.Rows, Row{Contender: tcnatLeased, Values: []float64{taken.locked / 1e6}})
	return nil
}

// openTCP opens flows with the packets of a handshake.
func (c *contender) openTCP(ctx context.Context, flows, containers int) error {
	o := trafficOptions{flows: flows, containers: containers, tcp: [2]byte{tcpSYN, tcpSYN | tcpACK}}
	t, err := c.newTraffic(o)
	if err != nil {
		return err
	}
	if err := t.answer(ctx, 0); err != nil {
		return err
	}
	o.tcp[0] = tcpACK
	if t, err = c.newTraffic(o); err != nil {
		return err
	}
	_, err = t.forward.carry(ctx, blastOptions{})
	return err
}

// memory is what is in use, in bytes.
type memory struct{ locked, slab float64 }

func (c *contender) memory(ctx context.Context) (m memory, err error) {
	if c.pins != "" {
		if m.locked, err = lockedMemory(c.pins); err != nil {
			return m, err
		}
	}
	m.slab, err = slabMemory(ctx)
	return m, err
}

// lockedMemory sums what the maps that are pinned below a directory take.
func lockedMemory(dir string) (sum float64, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Base(filepath.Dir(path)) != "maps" {
			return err
		}
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		defer m.Close()
		text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", m.FD()))
		if err != nil {
			return err
		}
		bytes, err := field64(text, "memlock:")
		sum += bytes
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("memory of the maps in %s: %w", dir, err)
	}
	return sum, nil
}

// slabMemory reads the machine's slab memory once it stands still, or slabPatience has passed:
// what earlier measurements left is freed in the background.
func slabMemory(ctx context.Context) (float64, error) {
	last := -1.0
	for deadline := time.Now().Add(slabPatience); ; {
		text, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			return 0, fmt.Errorf("slab memory: %w", err)
		}
		kilobytes, err := field64(text, "Slab:")
		if err != nil {
			return 0, err
		}
		if math.Abs(kilobytes-last) < slabStill || time.Now().After(deadline) {
			return kilobytes * 1024, nil
		}
		last = kilobytes
		select {
		case <-time.After(slabPoll):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// field64 is the number behind a word at the start of a line.
func field64(text []byte, name string) (float64, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) >= 2 && words[0] == name {
			return strconv.ParseFloat(words[1], 64)
		}
	}
	return 0, fmt.Errorf("%s is not in %q", name, text)
}
