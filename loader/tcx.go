package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// tcxPin is the pin of the link of one hook.
func (p pins) tcxPin(ifindex uint32, h hook) string {
	return filepath.Join(p.links(), strconv.FormatUint(uint64(ifindex), 10)+"-"+h.String())
}

func (h hook) tcxType() ebpf.AttachType {
	if h.ingress {
		return ebpf.AttachTCXIngress
	}
	return ebpf.AttachTCXEgress
}

// attachTCX attaches and pins. The error wraps link.ErrNotSupported before kernel 6.6.
func (p pins) attachTCX(d device, h hook, program *ebpf.Program) error {
	anchor := link.Head()
	if h.ingress {
		anchor = link.Tail()
	}
	options := link.TCXOptions{Interface: d.index(), Program: program, Attach: h.tcxType(), Anchor: anchor}
	l, err := link.AttachTCX(options)
	// The kernel ends a link whose pin is lost a moment later.
	for end := time.Now().Add(time.Second); errors.Is(err, unix.EEXIST) && time.Now().Before(end); l, err = link.AttachTCX(options) {
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("%s: attach %s to TCX %s: %w", d, h.program, h, known(err))
	}
	defer l.Close()
	if err := l.Pin(p.tcxPin(d.Ifindex, h)); err != nil {
		return fmt.Errorf("%s: pin the link of TCX %s: %w", d, h, known(err))
	}
	return nil
}

// ensureTCX makes the hook run the program: the pinned link is updated, one that is missing
// or severed is made anew. undo takes back an update, nil when there was none.
func (p pins) ensureTCX(d device, h hook, program *ebpf.Program, id ebpf.ProgramID) (undo func() error, err error) {
	path := p.tcxPin(d.Ifindex, h)
	l, err := loadTCX(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, p.attachTCX(d, h, program)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("%s: link of TCX %s: %w", d, h, err)
	}
	if info.Program == id {
		return nil, nil
	}
	if err := l.Update(program); err != nil {
		return nil, fmt.Errorf("%s: swap %s on TCX %s: %w", d, h.program, h, known(err))
	}
	return func() error { return restoreLink(path, info.Program, attachedTCX) }, nil
}

// restoreLink makes a pinned link run a program that is still there.
func restoreLink(path string, id ebpf.ProgramID, attached func(link.Link) bool) error {
	old, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Errorf("%s: go back to program %d: %w", path, id, err)
	}
	defer old.Close()
	l, err := loadLink(path, attached)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Update(old)
}

func loadTCX(path string) (link.Link, error) { return loadLink(path, attachedTCX) }

// loadLink opens the pin of a link that is attached. A severed one (device, namespace or cgroup gone,
// or detached by hand) and a pin of something else are removed, and reported as os.ErrNotExist.
func loadLink(path string, attached func(link.Link) bool) (link.Link, error) {
	if _, err := os.Lstat(path); err != nil {
		return nil, err
	}
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("%s: %w", path, known(err))
		}
		return nil, unpin(path)
	}
	if !attached(l) {
		l.Close()
		return nil, unpin(path)
	}
	return l, nil
}

func attachedTCX(l link.Link) bool {
	info, err := l.Info()
	return err == nil && info.TCX() != nil && info.TCX().Ifindex != 0
}

func unpin(path string) error {
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove dead pin: %w", known(err))
	}
	return fmt.Errorf("%s: %w", path, os.ErrNotExist)
}

// detachTCX removes the links of a device. Those that are not there are no error.
func (p pins) detachTCX(ifindex uint32) error {
	var errs []error
	for _, h := range []hook{{ingress: true}, {ingress: false}} {
		errs = append(errs, removeLink(p.tcxPin(ifindex, h)))
	}
	return errors.Join(errs...)
}

// removeLink detaches what the pin holds, whoever else holds it too, and removes the pin.
func removeLink(path string) error {
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		// A severed link cannot be detached again, and need not.
		_ = l.Detach()
		l.Close()
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", known(err))
	}
	return nil
}
