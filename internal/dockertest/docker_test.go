package dockertest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

const (
	testTime  = 3 * time.Minute
	container = "web"
	published = 3005
)

// scenario is a host with Docker and one container, and the world it is published to.
type scenario struct {
	lab      *lab.Lab
	daemon   *daemon
	tcnat    string // path of the command
	peer     string // path of the program that asks and answers
	cgroup   string // of version 2, empty: commands of the host's go there
	instance loader.Instance
}

func TestContainerAndPublishedPort(t *testing.T) {
	needDocker(t)
	tcnat := goBuild(t, "tcnat/cmd/tcnat")
	peer := goBuild(t, "tcnat/internal/dockertest/peer")
	for _, tc := range []struct {
		flag string
		// What a client in the world reaches at the published port before tcnat: a server
		// that takes the bridge for its client, or nobody ("").
		before string
	}{
		{"--userland-proxy=true", lab.BridgeAddr(lab.IPv4).String()},
		{"--userland-proxy=false", ""},
	} {
		t.Run(strings.TrimLeft(tc.flag, "-"), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), testTime)
			defer cancel()
			s := newScenario(ctx, t, tcnat, peer, tc.flag)
			sysctls := s.sysctls(t)

			s.mustNotReachWorld(ctx, t)
			s.mustBeSeenAs(ctx, t, tc.before)
			s.mustReachItself(ctx, t, tc.before != "")

			s.run(ctx, t, "attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink, "--cgroup", s.cgroup)
			s.mustReachWorld(ctx, t)
			address := s.containerAddress(ctx, t)
			for _, protocol := range []string{"tcp", "udp"} {
				s.run(ctx, t, "dnat", "add", "-p", protocol, "--dport", fmt.Sprint(published),
					"--to-destination", fmt.Sprintf("%s:%d", address, published))
			}
			s.mustBeSeenAs(ctx, t, s.lab.World.Addr(lab.IPv4).String())
			s.mustReachItself(ctx, t, true)
			s.mustReachWorld(ctx, t)
			s.mustHaveNoFirewallRule(ctx, t)

			s.run(ctx, t, "detach")
			s.mustHaveLeftNothing(ctx, t)
			if diff := cmp.Diff(sysctls, s.sysctls(t)); diff != "" {
				t.Errorf("sysctls before attach (-) and after detach (+):\n%s", diff)
			}
			s.mustNotReachWorld(ctx, t)
			s.mustBeSeenAs(ctx, t, tc.before)
			s.mustReachItself(ctx, t, tc.before != "")
		})
	}
}

// needDocker skips the test where it cannot run; TCNAT_TEST_REQUIRE makes that a failure.
func needDocker(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts dockerd twice, half a minute")
	}
	missing := ""
	for _, command := range []string{"dockerd", "docker", "busybox", "nsenter", "unshare", "iptables-save", "nft"} {
		if _, err := exec.LookPath(command); err != nil {
			missing = "needs the command " + command
		}
	}
	if os.Geteuid() != 0 {
		missing = "needs root"
	}
	switch {
	case missing == "":
	case os.Getenv("TCNAT_TEST_REQUIRE") != "":
		t.Fatal(missing)
	default:
		t.Skip(missing)
	}
}

// newScenario builds the lab, starts dockerd in its host, the container in that, and a
// server in the world. All of it is gone at the end of the test.
func newScenario(ctx context.Context, t *testing.T, tcnat, peer, daemonFlag string) *scenario {
	t.Helper()
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	// Docker makes a docker0 of its own.
	if _, err := l.Host.Command(ctx, "ip", "link", "delete", lab.Bridge); err != nil {
		t.Fatal(err)
	}
	s := &scenario{
		lab: l, tcnat: tcnat, peer: peer,
		daemon:   startDaemon(t, l.Host, daemonFlag),
		cgroup:   newCgroup(t, "tcnat-docker-"+l.Name),
		instance: loader.Instance{Name: "docker-" + l.Name},
	}
	t.Cleanup(func() {
		if _, err := s.command(context.Background(), "detach"); err != nil {
			t.Error(err)
		}
	})

	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	image := imageTar(t, map[string]string{"busybox": busybox, "peer": peer})
	s.daemon.mustDocker(ctx, t, image, "import", "-", "tcnat-test")
	port := fmt.Sprintf("%d:%d", published, published)
	s.daemon.mustDocker(ctx, t, nil, "run", "--detach", "--name", container,
		"-p", port+"/tcp", "-p", port+"/udp", "tcnat-test", "/bin/peer", "serve", fmt.Sprintf(":%d", published))
	s.serveWorld(ctx, t)
	s.poll(ctx, t, "the container serves", func() error {
		_, err := s.inContainer(ctx, "/bin/peer", "ask", "tcp", fmt.Sprintf("127.0.0.1:%d", published), "hi")
		return err
	})
	return s
}

// worldServer is an address that nobody but the world itself knows, and a port there.
func (s *scenario) worldServer() string {
	return s.lab.World.Loopback(lab.IPv4).String() + ":7"
}

// serveWorld starts the server in the world that the container asks.
func (s *scenario) serveWorld(ctx context.Context, t *testing.T) {
	t.Helper()
	server := start(t, exec.Command("nsenter", "--net="+s.lab.World.Path(), s.peer, "serve", s.worldServer()))
	t.Cleanup(func() { server.kill(t) })
	s.poll(ctx, t, "the world serves", func() error {
		_, err := s.lab.World.Command(ctx, s.peer, "ask", "tcp", s.worldServer(), "hi")
		return err
	})
}

// poll waits until a condition holds, and fails the test when it does not in good time.
func (s *scenario) poll(ctx context.Context, t *testing.T, what string, holds func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		err := holds()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waiting until %s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// command runs tcnat in the host's network namespace.
func (s *scenario) command(ctx context.Context, args ...string) (string, error) {
	return s.lab.Host.Command(ctx, s.tcnat, append([]string{"--instance", s.instance.Name}, args...)...)
}

func (s *scenario) run(ctx context.Context, t *testing.T, args ...string) {
	t.Helper()
	out, err := s.command(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("tcnat %s\n%s", strings.Join(args, " "), out)
}

func (s *scenario) containerAddress(ctx context.Context, t *testing.T) string {
	t.Helper()
	return s.daemon.mustDocker(ctx, t, nil, "inspect", "--format", "{{.NetworkSettings.IPAddress}}", container)
}

// inContainer runs one of the image's programs.
func (s *scenario) inContainer(ctx context.Context, args ...string) (string, error) {
	return s.daemon.docker(ctx, nil, append([]string{"exec", container}, args...)...)
}

// reachWorld tries what a container wants of the world, and returns an error for each
// protocol that does not work, or whose packets do not carry the uplink's address.
func (s *scenario) reachWorld(ctx context.Context) map[string]error {
	results := make(map[string]error)
	_, results["ping"] = s.inContainer(ctx, "/bin/busybox", "ping", "-c", "1", "-W", "1", s.lab.World.Loopback(lab.IPv4).String())
	want := s.lab.Host.Addr(lab.IPv4).String() + " out"
	for _, protocol := range []string{"tcp", "udp"} {
		got, err := s.inContainer(ctx, "/bin/peer", "ask", protocol, s.worldServer(), "out")
		if err == nil && got != want {
			err = fmt.Errorf("the world's server saw %q, want %q", got, want)
		}
		results[protocol] = err
	}
	return results
}

func (s *scenario) mustReachWorld(ctx context.Context, t *testing.T) {
	t.Helper()
	for protocol, err := range s.reachWorld(ctx) {
		if err != nil {
			t.Errorf("%s from the container: %v", protocol, err)
		}
	}
}

func (s *scenario) mustNotReachWorld(ctx context.Context, t *testing.T) {
	t.Helper()
	for protocol, err := range s.reachWorld(ctx) {
		if err == nil {
			t.Errorf("%s from the container works without tcnat", protocol)
		}
	}
}

// mustBeSeenAs asks the published port from the world and checks which client the
// container's server sees; client "": nothing answers.
func (s *scenario) mustBeSeenAs(ctx context.Context, t *testing.T, client string) {
	t.Helper()
	at := fmt.Sprintf("%s:%d", s.lab.Host.Addr(lab.IPv4), published)
	for _, protocol := range []string{"tcp", "udp"} {
		got, err := s.lab.World.Command(ctx, s.peer, "ask", protocol, at, "in")
		switch {
		case client == "" && err == nil:
			t.Errorf("%s port %d answers without tcnat: %q", protocol, published, got)
		case client != "" && err != nil:
			t.Errorf("%s port %d from the world: %v", protocol, published, err)
		case client != "" && strings.TrimSpace(got) != client+" in":
			t.Errorf("%s: the container's server saw %q, want %q", protocol, strings.TrimSpace(got), client+" in")
		}
	}
}

// mustReachItself asks the published port from the host itself, by its own addresses. The server
// takes the bridge for its client, whether docker-proxy asks or the host's own socket does.
func (s *scenario) mustReachItself(ctx context.Context, t *testing.T, reaches bool) {
	t.Helper()
	for _, address := range []string{"127.0.0.1", "[::1]", s.lab.Host.Addr(lab.IPv4).String(), lab.BridgeAddr(lab.IPv4).String()} {
		for _, protocol := range []string{"tcp", "udp"} {
			at := fmt.Sprintf("%s:%d", address, published)
			got, err := s.lab.Host.Command(ctx, "sh", "-c", `echo $$ >"$0" && exec "$@"`,
				filepath.Join(s.cgroup, "cgroup.procs"), s.peer, "ask", protocol, at, "in")
			want := lab.BridgeAddr(lab.IPv4).String() + " in"
			if reaches && (err != nil || strings.TrimSpace(got) != want) || !reaches && err == nil {
				t.Errorf("%s to %s from the host itself: the container's server saw %q, error %v, want it reached: %t",
					protocol, at, strings.TrimSpace(got), err, reaches)
			}
		}
	}
}

// newCgroup makes an empty cgroup of version 2.
func newCgroup(t *testing.T, name string) string {
	t.Helper()
	root := t.TempDir()
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, name)
	t.Cleanup(func() {
		if err := errors.Join(os.Remove(dir), unix.Unmount(root, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// mustHaveNoFirewallRule checks that neither iptables nor nftables holds anything.
func (s *scenario) mustHaveNoFirewallRule(ctx context.Context, t *testing.T) {
	t.Helper()
	for _, command := range [][]string{{"iptables-save"}, {"nft", "list", "ruleset"}} {
		out, err := s.lab.Host.Command(ctx, command[0], command[1:]...)
		if err != nil {
			t.Error(err)
		}
		if strings.TrimSpace(out) != "" {
			t.Errorf("%s is not empty:\n%s", strings.Join(command, " "), out)
		}
	}
}

// sysctls returns what tcnat could have changed.
func (s *scenario) sysctls(t *testing.T) map[string]string {
	t.Helper()
	values, err := s.lab.Host.Sysctls()
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// mustHaveLeftNothing checks that no pin, program or qdisc is there after detach.
func (s *scenario) mustHaveLeftNothing(ctx context.Context, t *testing.T) {
	t.Helper()
	if _, err := os.Stat(s.instance.Dir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pins are left in %s: %v", s.instance.Dir(), err)
	}
	for _, device := range []string{lab.Bridge, lab.Uplink} {
		index, err := s.lab.Host.Ifindex(device)
		if err != nil {
			t.Fatal(err)
		}
		for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			var result *link.QueryResult
			err := s.lab.Host.Do(func() (err error) {
				result, err = link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook})
				return err
			})
			switch {
			case errors.Is(err, unix.EINVAL), errors.Is(err, link.ErrNotSupported): // a kernel without TCX
			case err != nil:
				t.Errorf("%s %s: %v", device, hook, err)
			case len(result.Programs) > 0:
				t.Errorf("%s %s: %d programs are left", device, hook, len(result.Programs))
			}
		}
		out, err := s.lab.Host.Command(ctx, "tc", "qdisc", "show", "dev", device)
		if err != nil || strings.Contains(out, "clsact") {
			t.Errorf("%s: a clsact qdisc is left: %v\n%s", device, err, out)
		}
	}
}
