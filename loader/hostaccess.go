package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// CgroupAuto as AttachOptions.Cgroup stands for the cgroup v2 hierarchy's mount point, so for the
// sockets of all processes.
const CgroupAuto = "auto"

// HostAccess is how the host's own sockets reach published ports.
type HostAccess struct {
	Attached bool
	Cgroup   string // directory; "" when not attached, or where no mount shows it
}

// hostHook is a cgroup hook and the program that runs there.
type hostHook struct {
	program string
	at      ebpf.AttachType
}

// hostHooks are in the order of attaching: what names the published address again comes before
// what hides it.
func hostHooks() []hostHook {
	return []hostHook{
		{bpf.NATProgLocalRelease, ebpf.AttachCgroupInetSockRelease},
		{bpf.NATProgLocalGetpeername4, ebpf.AttachCgroupInet4GetPeername},
		{bpf.NATProgLocalGetpeername6, ebpf.AttachCgroupInet6GetPeername},
		{bpf.NATProgLocalRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
		{bpf.NATProgLocalRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
		{bpf.NATProgLocalSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
		{bpf.NATProgLocalSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
		{bpf.NATProgLocalConnect4, ebpf.AttachCGroupInet4Connect},
		{bpf.NATProgLocalConnect6, ebpf.AttachCGroupInet6Connect},
	}
}

func isHostProgram(name string) bool {
	return slices.ContainsFunc(hostHooks(), func(h hostHook) bool { return h.program == name })
}

const hostPinPrefix = "cgroup-"

// hostPin is the pin of the link of one hook of a cgroup.
func (p pins) hostPin(cgroup uint64, h hostHook) string {
	return filepath.Join(p.links(), hostPinPrefix+strconv.FormatUint(cgroup, 10)+"-"+h.program)
}

// hostPins are the pins of such links, of whatever cgroup.
func (p pins) hostPins() []string {
	found, _ := filepath.Glob(filepath.Join(p.links(), hostPinPrefix+"*"))
	return found
}

// findCgroup decides about the cgroup, before anything changes. It is 0 for none.
func (a *attachment) findCgroup() error {
	dir := a.opts.Cgroup
	if a.manual || dir == "" {
		return nil
	}
	if dir == CgroupAuto {
		if dir = mountedCgroup(); dir == "" {
			a.log.Warn("no cgroup v2 hierarchy is mounted, so the host itself reaches published ports by docker-proxy at most: mount one, then attach again")
			return nil
		}
	}
	id, err := cgroupID(dir)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	a.cgroup, a.cgroupID = dir, id
	return nil
}

// mountedCgroup is where the root of the cgroup v2 hierarchy is mounted, as far as this mount
// namespace has it; on hosts with both versions that is not /sys/fs/cgroup itself.
func mountedCgroup() string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for _, dir := range cgroupRoots(string(mounts)) {
		if _, err := cgroupID(dir); err == nil { // else another mount covers it
			return dir
		}
	}
	return ""
}

// cgroupRoots are the mounts of the cgroup v2 hierarchy that begin at its root.
func cgroupRoots(mounts string) []string {
	var roots []string
	for line := range strings.Lines(mounts) {
		if dir, top := cgroupMount(line, "cgroup2"); dir != "" && top == "/" {
			roots = append(roots, dir)
		}
	}
	return roots
}

// cgroupID is the kernel's number of a cgroup. The error wraps ErrBadCgroup.
func cgroupID(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrBadCgroup, known(err))
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%w: name a directory of cgroup v2", ErrBadCgroup)
	}
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrBadCgroup, known(err))
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, fmt.Errorf("%w: name a directory of cgroup v2", ErrBadCgroup)
	}
	return stat.Ino, nil
}

// attachHost makes the cgroup's hooks run the current programs. A cgroup that nobody asked for, and
// that somebody else keeps, is done without.
func (c *connector) attachHost(undos *[]func() error) error {
	if c.cgroup == "" {
		return nil
	}
	for _, h := range hostHooks() {
		undo, err := c.ensureHost(h)
		if undo != nil {
			*undos = append(*undos, undo)
		}
		if errors.Is(err, ErrConflict) && c.opts.Cgroup == CgroupAuto {
			c.log.Warn("the host itself reaches published ports by docker-proxy at most", "why", err)
			c.cgroup = ""
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *connector) ensureHost(h hostHook) (undo func() error, err error) {
	program, id := c.host[h.program], c.hostIDs[h.program]
	if program == nil {
		return nil, fmt.Errorf("cgroup %s: no program %s", c.cgroup, h.program)
	}
	path := c.pins.hostPin(c.cgroupID, h)
	l, err := loadLink(path, attachedCgroup)
	if errors.Is(err, os.ErrNotExist) {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: c.cgroup, Attach: h.at, Program: program})
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("cgroup %s: attach %s: %w: a program of somebody else there or above shares with nobody: use --cgroup none, or the cgroup of those that need published ports",
				c.cgroup, h.program, ErrConflict)
		}
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: attach %s: %w", c.cgroup, h.program, known(err))
		}
		defer l.Close()
		if err := l.Pin(path); err != nil {
			return nil, fmt.Errorf("cgroup %s: pin the link of %s: %w", c.cgroup, h.program, known(err))
		}
		return func() error { return removeLink(path) }, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", c.cgroup, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: link of %s: %w", c.cgroup, h.program, err)
	}
	if info.Program == id {
		return nil, nil
	}
	if err := l.Update(program); err != nil {
		return nil, fmt.Errorf("cgroup %s: swap %s: %w", c.cgroup, h.program, known(err))
	}
	return func() error { return restoreLink(path, info.Program, attachedCgroup) }, nil
}

// dropHost takes the programs off every other cgroup, those that lead sockets astray first.
func (c *connector) dropHost() error {
	var errs []error
	for _, h := range slices.Backward(hostHooks()) {
		for _, path := range c.pins.hostPins() {
			if strings.HasSuffix(path, "-"+h.program) && (c.cgroup == "" || path != c.pins.hostPin(c.cgroupID, h)) {
				errs = append(errs, removeLink(path))
			}
		}
	}
	return errors.Join(errs...)
}

// HasHostAccess says whether the host's own sockets reach published ports.
func (i Instance) HasHostAccess() bool { return len(pinsIn(i.withDefaults().Dir()).hostPins()) > 0 }

// hostLink is what a pinned link of the host's access holds.
type hostLink struct {
	program ebpf.ProgramID
	cgroup  uint64
}

// hostLinks are the links that are attached, by the names of the programs.
func (p pins) hostLinks() map[string]hostLink {
	links := make(map[string]hostLink)
	for _, path := range p.hostPins() {
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			continue
		}
		if info, err := l.Info(); err == nil && attachedCgroup(l) {
			name := path[strings.LastIndexByte(path, '-')+1:]
			links[name] = hostLink{info.Program, info.Cgroup().CgroupId}
		}
		l.Close()
	}
	return links
}

// cgroupPath is the directory of a cgroup, "" where no mount shows it.
func cgroupPath(id uint64) string {
	const fileIDKernfs = 0xfe
	root := mountedCgroup()
	if root == "" {
		return ""
	}
	mount, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(mount)
	handle := unix.NewFileHandle(fileIDKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(mount, handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return ""
	}
	return path
}

func attachedCgroup(l link.Link) bool {
	info, err := l.Info()
	return err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId != 0
}

// hostAddresses are the addresses that are the host's own, but for those that no rule is about.
// IPv6 makes temporary ones for outgoing connections, which come and go.
func (a *attachment) hostAddresses(temporary bool) (map[netip.Addr]uint32, error) {
	list, err := retryDump(func() ([]netlink.Addr, error) { return a.nl.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", known(err))
	}
	addresses := make(map[netip.Addr]uint32)
	for _, entry := range list {
		address, ok := netip.AddrFromSlice(entry.IP)
		if !ok || !temporary && entry.Flags&unix.IFA_F_TEMPORARY != 0 && address.Is6() {
			continue
		}
		address = address.Unmap()
		if !address.IsLoopback() && !(address.Is6() && address.IsLinkLocalUnicast()) {
			addresses[address] = uint32(entry.LinkIndex)
		}
	}
	return addresses, nil
}

// hostStatus tells where the host's own access is attached, and what is not as it should be.
func (d *Datapath) hostStatus(s *Status, a *attachment) error {
	p := pinsIn(d.inst.Dir())
	have := p.hostLinks()
	if len(have) == 0 {
		if len(p.hostPins()) > 0 {
			s.Problems = append(s.Problems, "cgroup: it is gone, and the host's own access with it: run tcnat attach again")
		}
		return nil
	}
	s.HostAccess.Attached = true
	wanted, err := programIDs(d.progs.progs)
	if err != nil {
		return err
	}
	for _, h := range hostHooks() {
		switch id, ok := have[h.program]; {
		case !ok:
			s.Problems = append(s.Problems, fmt.Sprintf("cgroup: %s is not attached: run tcnat attach again", h.program))
		case id.program != wanted[h.program]:
			s.Problems = append(s.Problems, fmt.Sprintf("cgroup: %s is of another build, since an upgrade was interrupted: run tcnat attach again", h.program))
		default:
			s.HostAccess.Cgroup = cgroupPath(id.cgroup)
		}
	}
	now, err := a.hostAddresses(false)
	if err != nil {
		return err
	}
	noted, err := d.state.HostAddresses()
	if err != nil {
		return err
	}
	for _, address := range slices.SortedFunc(maps.Keys(now), netip.Addr.Compare) {
		if _, ok := noted[address]; !ok {
			s.Problems = append(s.Problems, fmt.Sprintf("%s: the host has it since attach ran, and does not reach published ports by it: run tcnat attach again", address))
		}
	}
	return nil
}
