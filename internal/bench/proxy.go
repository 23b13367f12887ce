package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// proxyPatience is how long docker-proxy may take to listen.
const proxyPatience = 5 * time.Second

// installProxy starts a docker-proxy for the published TCP port.
func installProxy(ctx context.Context, r *rig, _ installOptions) (installed, error) {
	path, err := lookPath(dockerProxy)
	if err != nil {
		return installed{}, err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return installed{}, fmt.Errorf("docker-proxy: %w", err)
	}
	defer read.Close()
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() {
		// The process is to die with its parent thread: this one stays until it has ended.
		ended <- r.Host.Do(func() error {
			cmd := exec.CommandContext(ctx, path, "-proto", "tcp", "-host-ip", r.hostAddr().String(), "-host-port", fmt.Sprint(publishedPort),
				"-container-ip", r.containerAddr(0).String(), "-container-port", fmt.Sprint(publishedPort))
			cmd.ExtraFiles = []*os.File{write} // where it says how starting went
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			err := cmd.Start()
			_ = write.Close()
			if err != nil {
				return err
			}
			return cmd.Wait()
		})
	}()
	stop := func(context.Context) error {
		cancel()
		<-ended
		return nil
	}
	_ = read.SetReadDeadline(time.Now().Add(proxyPatience))
	said, err := io.ReadAll(io.LimitReader(read, 2))
	if answer := strings.TrimSpace(string(said)); answer != "0" {
		if err == nil {
			err = errors.New("did not start")
		}
		return installed{}, errors.Join(fmt.Errorf("docker-proxy: %w (said %q)", err, answer), stop(ctx))
	}
	return installed{remove: stop}, nil
}
