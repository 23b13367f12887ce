// Command peer is what the Docker test runs on both sides of the NAT: a TCP and UDP server
// that answers with the client's address as it sees it, and the client that asks.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// patience bounds one question, connecting included.
const patience = time.Second

const usage = "usage: peer serve ADDR:PORT | peer ask tcp|udp ADDR:PORT WORD"

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1], out)
	case len(args) == 4 && args[0] == "ask":
		answer, err := ask(args[1], args[2], args[3])
		if err == nil {
			fmt.Fprintln(out, answer)
		}
		return err
	}
	return errors.New(usage)
}

// serve answers on TCP and UDP until the process is ended; it prints "ready" once it does.
func serve(at string, out io.Writer) error {
	streams, err := net.Listen("tcp", at)
	if err != nil {
		return err
	}
	datagrams, err := net.ListenPacket("udp", at)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	failed := make(chan error, 2)
	go func() { failed <- serveStreams(streams) }()
	go func() { failed <- serveDatagrams(datagrams) }()
	return <-failed
}

func serveStreams(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			if word, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				fmt.Fprint(conn, reply(conn.RemoteAddr(), word))
			}
		}()
	}
}

func serveDatagrams(conn net.PacketConn) error {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		// A client that went away is no reason to stop.
		_, _ = conn.WriteTo([]byte(reply(from, string(buf[:n]))), from)
	}
}

// reply is "ADDR WORD\n": the client's address without its port, and what it said.
func reply(client net.Addr, word string) string {
	host, _, _ := net.SplitHostPort(client.String())
	return host + " " + word
}

// ask sends a word and returns the one line that comes back.
func ask(network, at, word string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, network, at)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(conn, word); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}
