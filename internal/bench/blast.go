package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

const (
	batchSize = 64 // frames a system call
	// checkEvery is after how many batches a sender looks at its context.
	checkEvery = 64
	// maxBlast bounds every flood, whatever was asked for.
	maxBlast = time.Minute
)

// port is an AF_PACKET socket bound to a device of a node: what is sent to it leaves by the
// device as if the node had sent it.
type port struct{ fd int }

// openPort opens a socket on a device. With partial, a virtio header goes before each frame.
func openPort(n *lab.Node, device string, partial bool) (port, error) {
	index, err := n.Ifindex(device)
	if err != nil {
		return port{}, err
	}
	fd := -1
	err = n.Do(func() (err error) {
		// Protocol 0: it receives nothing.
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if partial {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
				return err
			}
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 1}); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index})
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return port{}, fmt.Errorf("%s: packet socket on %s: %w", n.Role, device, err)
	}
	return port{fd: fd}, nil
}

func (p port) close() { _ = unix.Close(p.fd) }

// stream is frames of one sender that go out by one port.
type stream struct {
	port  port
	frame frameOptions
	pairs portPairs
}

// mmsghdr is struct mmsghdr of the kernel; unix has none.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// batch is the frames of one system call, made once and filled in again and again.
type batch struct {
	port     port
	pairs    portPairs
	template template
	frames   [batchSize][vnetSize + frameSize]byte
	iovecs   [batchSize]unix.Iovec
	messages [batchSize]mmsghdr
}

func newBatch(s stream) *batch {
	b := &batch{port: s.port, pairs: s.pairs, template: newTemplate(s.frame)}
	skip := vnetSize
	if s.frame.partial {
		skip = 0
	}
	for i := range b.frames {
		b.frames[i] = b.template.bytes
		b.iovecs[i].Base = &b.frames[i][skip]
		b.iovecs[i].SetLen(len(b.frames[i]) - skip)
		b.messages[i].hdr.Iov = &b.iovecs[i]
		b.messages[i].hdr.SetIovlen(1)
	}
	return b
}

// send fills n frames with the next ports and sends them.
func (b *batch) send(n int) error {
	for i := range n {
		sport, dport := b.pairs.next()
		b.template.fill(b.frames[i][vnetSize:], sport, dport)
	}
	return sendMessages(b.port.fd, b.messages[:n])
}

// sendMessages sends all messages. It tells the Go runtime nothing of the system call, which
// is short: a batch is carried to its end in some 100 microseconds.
func sendMessages(fd int, messages []mmsghdr) error {
	for len(messages) > 0 {
		sent, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd),
			uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), 0, 0, 0)
		switch {
		case errno == unix.EINTR, errno == unix.ENOBUFS:
			continue
		case errno != 0:
			return fmt.Errorf("sendmmsg: %w", errno)
		}
		messages = messages[sent:]
	}
	return nil
}

// blastResult is what a flood came to.
type blastResult struct {
	sent uint64
	took time.Duration
}

// blastOptions bound a flood: by time, or to each pair of ports once.
type blastOptions struct {
	cpu      int
	duration time.Duration // 0: each pair of each stream once
	limit    time.Duration // of a flood that goes through the pairs once; 0: maxBlast
}

// blast sends the streams' frames by turns, a batch each, from a thread pinned to a CPU.
func blast(ctx context.Context, streams []stream, o blastOptions) (blastResult, error) {
	if o.limit == 0 {
		o.limit = maxBlast
	}
	var result blastResult
	batches := make([]*batch, len(streams))
	for i, s := range streams {
		batches[i] = newBatch(s)
	}
	err := onCPU(o.cpu, func() (err error) {
		if o.duration == 0 {
			result, err = sendOnce(ctx, batches, o.limit)
		} else {
			result, err = sendFor(ctx, batches, min(o.duration, maxBlast))
		}
		return err
	})
	return result, err
}

func sendFor(ctx context.Context, batches []*batch, d time.Duration) (r blastResult, err error) {
	start := time.Now()
	for turn := 0; ; turn++ {
		if err := batches[turn%len(batches)].send(batchSize); err != nil {
			return r, err
		}
		r.sent += batchSize
		if r.took = time.Since(start); r.took >= d {
			return r, nil
		}
		if turn%checkEvery == 0 && ctx.Err() != nil {
			return r, ctx.Err()
		}
	}
}

func sendOnce(ctx context.Context, batches []*batch, limit time.Duration) (r blastResult, err error) {
	left := make([]int, len(batches))
	for i, b := range batches {
		left[i] = b.pairs.size()
	}
	start := time.Now()
	for turn, sending := 0, true; sending; turn++ {
		sending = false
		for i, b := range batches {
			n := min(left[i], batchSize)
			if n == 0 {
				continue
			}
			if err := b.send(n); err != nil {
				return r, err
			}
			left[i] -= n
			r.sent += uint64(n)
			sending = true
		}
		if turn%checkEvery == 0 && ctx.Err() != nil {
			return r, ctx.Err()
		}
		if time.Since(start) >= limit {
			break
		}
	}
	r.took = time.Since(start)
	return r, nil
}

// onCPU runs fn on a thread of its own that is pinned to a CPU.
func onCPU(cpu int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		err := errors.New("panicked")
		defer func() { done <- err }()
		if err = pin(cpu); err == nil {
			err = fn()
		}
	}()
	return <-done
}
