package dockertest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tcnat/internal/lab"
)

const (
	startTime = 60 * time.Second
	stopTime  = 20 * time.Second
)

// isolate is run in the daemon's own mount namespace: what it and containerd write below
// /run and /etc/docker is gone with them.
const isolate = `set -e
mount -t tmpfs tmpfs /run
[ ! -d /etc/docker ] || mount -t tmpfs tmpfs /etc/docker
exec "$@"`

// daemon is a dockerd of the test's own.
type daemon struct {
	dir     string // data, socket, log
	cgroup  string // parent of the containers' cgroups
	process *process
}

// startDaemon runs dockerd in a node's network namespace until the end of the test.
func startDaemon(t *testing.T, host *lab.Node, flags ...string) *daemon {
	t.Helper()
	// Not t.TempDir: a socket's path has to be short.
	dir, err := os.MkdirTemp("", "tcnat-docker-")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{dir: dir, cgroup: "/" + filepath.Base(dir)}
	if err := os.WriteFile(d.path("daemon.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(d.path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()

	args := append([]string{"--net=" + host.Path(),
		"unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", isolate, "sh",
		"dockerd", "--log-level=warn", "--iptables=false", "--ip6tables=false",
		"--data-root", d.path("data"), "--exec-root", d.path("exec"), "--pidfile", d.path("pid"),
		"--config-file", d.path("daemon.json"), "-H", d.socket(),
		"--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", d.cgroup}, flags...)
	cmd := exec.Command("nsenter", args...)
	cmd.Stdout, cmd.Stderr = log, log
	d.process = start(t, cmd)
	t.Cleanup(func() { d.stop(t) })
	d.waitUntilReady(t)
	return d
}

func (d *daemon) path(name string) string { return filepath.Join(d.dir, name) }
func (d *daemon) socket() string          { return "unix://" + d.path("sock") }

func (d *daemon) waitUntilReady(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(startTime); ; {
		conn, err := net.Dial("unix", d.path("sock"))
		if err == nil {
			conn.Close()
			break
		}
		select {
		case <-d.process.ended:
			t.Fatalf("dockerd ended:\n%s", d.log())
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("dockerd does not answer: %v\n%s", err, d.log())
		}
	}
}

// log returns the daemon's last words.
func (d *daemon) log() string {
	text, err := os.ReadFile(d.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// stop ends everything that startDaemon began. unshare's end takes the pid namespace with
// it, so dockerd, containerd, containers and docker-proxies; the last of them the mounts.
func (d *daemon) stop(t *testing.T) {
	if t.Failed() {
		t.Logf("dockerd's log:\n%s", d.log())
	}
	d.process.kill(t)
	for deadline := time.Now().Add(stopTime); ; time.Sleep(50 * time.Millisecond) {
		err := errors.Join(removeCgroups(d.cgroup), os.RemoveAll(d.dir))
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("clean up after dockerd: %v", err)
			return
		}
	}
}

// removeCgroups removes a cgroup and those in it from every hierarchy, one or two levels
// below /sys/fs/cgroup. It fails while a process is in one.
func removeCgroups(name string) error {
	var dirs []string
	for _, pattern := range []string{"/sys/fs/cgroup" + name, "/sys/fs/cgroup/*" + name} {
		roots, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, root := range roots {
			err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					dirs = append(dirs, path)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	slices.Reverse(dirs) // children first
	for _, dir := range dirs {
		if err := os.Remove(dir); err != nil {
			return err
		}
	}
	return nil
}

// docker runs the client; stdin may be nil.
func (d *daemon) docker(ctx context.Context, stdin []byte, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.socket(), "DOCKER_CONFIG="+d.dir)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), errors.Join(err, errors.New(strings.TrimSpace(stdout.String()+stderr.String())))
	}
	return strings.TrimSpace(stdout.String()), nil
}

func (d *daemon) mustDocker(ctx context.Context, t *testing.T, stdin []byte, args ...string) string {
	t.Helper()
	out, err := d.docker(ctx, stdin, args...)
	if err != nil {
		t.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	return out
}
